"""Recipes: short functions that return the config of a published table, or of the demo."""
