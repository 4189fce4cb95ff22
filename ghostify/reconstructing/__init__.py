"""Optional gradient steps, block by block."""
