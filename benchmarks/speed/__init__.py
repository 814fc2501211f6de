"""Time and memory against the plain way of doing the same in one run, and over the data's size."""
