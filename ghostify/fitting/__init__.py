"""Moments, least squares, and the walk that feeds them layer by layer."""
