"""What the weights of a policy against its reference do, see ``iwsft weights``."""
