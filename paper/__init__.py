"""The paper's data points, runs that reproduce them, and the tables and figures of both."""
