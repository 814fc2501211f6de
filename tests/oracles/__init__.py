"""Plain implementations with which tests compare results, and the benchmarks speed."""
