"""Every setting, on the standard library alone."""
