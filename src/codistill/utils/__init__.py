"""Helpers that import nothing else of codistill: errors, files, devices, signals, safe loading."""
