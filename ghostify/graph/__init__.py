"""Traced graphs: what their nodes compute, and how they are run."""
