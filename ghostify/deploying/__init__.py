"""The inference form and its files."""
