"""Files on disk: saved models, and atomic replacement of files and folders."""
