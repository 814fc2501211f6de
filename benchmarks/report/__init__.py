"""`iwsft report runs`: tables and figures of finished runs."""
