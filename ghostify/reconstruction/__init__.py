"""Block-wise reconstruction: gradient steps on the weights of a fit."""
