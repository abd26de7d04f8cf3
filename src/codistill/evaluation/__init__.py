"""Evaluation: metrics, calibration, costs, and BatchNorm folding."""
