"""Policies: anything with ``log_prob(trajectories)``, one number a step."""

from iwsft.policies.gaussian import GaussianPolicy

__all__ = ["GaussianPolicy"]
