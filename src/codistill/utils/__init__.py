"""What stands on nothing of codistill: errors, files, devices, signals, trust."""
