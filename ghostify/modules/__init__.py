"""Modules of converted models, and their layouts; independent of graphs."""
