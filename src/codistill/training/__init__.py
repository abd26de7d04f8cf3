"""Building a run and training it."""
