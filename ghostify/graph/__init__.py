"""Models as graphs: what their operators are."""
