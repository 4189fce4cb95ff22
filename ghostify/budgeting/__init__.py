"""From a budget to a plan: what layers lose, what they cost, how long they take here."""
