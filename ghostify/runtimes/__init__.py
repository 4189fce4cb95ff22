"""The runtimes that inference forms run in, one file each, and one protocol for all."""
