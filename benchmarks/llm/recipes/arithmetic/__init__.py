"""Sums written out step by step: the paper's bandit (Section 3.5) in language."""
