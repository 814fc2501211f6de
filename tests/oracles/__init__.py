"""Plain implementations that the library is compared with, for truth by tests and for speed."""
