"""Jobs that measure the library: `python -m benchmarks.NAME`."""
