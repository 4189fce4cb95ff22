"""Experiments that measure ghostify, what they share, and their results."""
