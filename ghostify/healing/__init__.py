"""Healing: gradient steps on the whole converted model towards the original's outputs."""
