"""Deployment: the inference form of a model, and its export to files."""
