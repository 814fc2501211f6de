"""`iwsft bandit`: what the weights do where the answer is known."""
