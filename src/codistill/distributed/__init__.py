"""A mesh of processes, data x peer."""
