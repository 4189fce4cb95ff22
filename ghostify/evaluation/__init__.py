"""Accuracy of models, and comparison with the original."""
