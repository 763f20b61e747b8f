"""The paper's data points, runs that reproduce them, and what the two have in common."""
