"""What is wished, and what becomes of every convolution."""
