"""The deployed student: exported files that need no codistill, predictions, calibration, model card."""
