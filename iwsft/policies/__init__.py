"""Policies: anything with ``log_prob(trajectories)``, one number per step."""

from iwsft.policies.causal_lm import CausalLMPolicy
from iwsft.policies.gaussian import GaussianPolicy
from iwsft.policies.mixture import MixturePolicy

__all__ = ["CausalLMPolicy", "GaussianPolicy", "MixturePolicy"]
