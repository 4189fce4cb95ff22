"""Predictions of models, and how well they agree with labels or with the original."""
