"""The user's rules, and the plan: each convolution once, rewritten, pruned or skipped with its reason."""
