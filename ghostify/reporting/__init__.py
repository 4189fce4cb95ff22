"""What was done and how good it is, to look at."""
