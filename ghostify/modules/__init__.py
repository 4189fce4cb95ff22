"""What runs in a converted network, and its description; knows no graphs."""
