"""What the weights of a policy against its reference do, see ``python -m benchmarks.weights``."""
