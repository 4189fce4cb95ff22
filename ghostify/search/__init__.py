"""From a budget to a plan: statistics, candidates with their costs and losses, and the solver."""
