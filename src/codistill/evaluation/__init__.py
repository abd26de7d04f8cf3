"""Measuring: metrics, calibration, cost, faster evaluation."""
