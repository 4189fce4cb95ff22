"""The folder on disk, without pickle."""
