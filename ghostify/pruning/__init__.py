"""Channel groups: which channels of a network must be permuted or pruned together."""
