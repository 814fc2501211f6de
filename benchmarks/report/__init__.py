"""`python -m benchmarks.report runs`: tables and figures of finished runs."""
