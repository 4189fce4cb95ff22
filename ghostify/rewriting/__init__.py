"""A plan and its fitted weights, applied to a copy of the traced module."""
