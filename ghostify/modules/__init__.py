"""Modules of converted models; know no graphs."""
