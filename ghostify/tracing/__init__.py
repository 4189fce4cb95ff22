"""Any model as graphs: what runs, in which order, on which shapes, and what is said of it as plain data."""
