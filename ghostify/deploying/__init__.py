"""The inference form, its files, and the runtimes that run them."""
