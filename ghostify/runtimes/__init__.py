"""Runtimes for inference forms: one protocol, and one file for each runtime."""
