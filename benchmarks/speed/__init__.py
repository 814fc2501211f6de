"""Time and memory against the plain way of doing the same, both measured in one run."""
