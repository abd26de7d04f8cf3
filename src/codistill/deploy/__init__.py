"""The one student: files that need no codistill, predictions, its model card."""
