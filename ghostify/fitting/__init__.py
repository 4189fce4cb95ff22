"""Fitting of ghost modules and pruned convolutions: second moments, least squares, and the lockstep run."""
