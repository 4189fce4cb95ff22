"""Models by name, images from files, training sets."""
