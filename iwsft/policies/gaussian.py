"""A Gaussian policy over continuous actions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModule
from torch import Tensor, nn
from torch.distributions import Normal
from torchrl.modules import IndependentNormal, ProbabilisticActor, TanhNormal
from torchrl.modules.distributions.continuous import SafeTanhTransform

from iwsft.policies.linear import mlp
from iwsft.policies.log_prob import ROUNDING, check_columns
from iwsft.trajectory import ACTION, OBSERVATION, on_host
from iwsft.validation import check_count

_LOG_SQRT_2_PI = 0.5 * math.log(2 * math.pi)
# Steps whose activations fit into a processor's cache, forward and backward.
_ROWS = 1024


class _SquashedNormal(TanhNormal):
    """TorchRL's tanh-Normal, which gives actions beyond -1 and 1 the density at the bounds."""

    def log_prob(self, value: Tensor, *args: Any) -> Tensor:
        """Return the log-density of actions in [-1, 1]; others raise a ValueError."""
        beyond = value.detach().abs().amax() if value.numel() else 0.0
        if beyond > 1 + ROUNDING:
            problem = f"the action {beyond:g} has no density under a tanh-Normal, in [-1, 1]"
            raise ValueError(f"{problem}; load the data with scale_actions=True")
        return super().log_prob(value, *args)

    @staticmethod
    def from_noise(loc: Tensor, scale: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the actions that standard normal noise gives, and their log-density.

        They are those of ``rsample_and_log_prob``, which draws the noise itself. A distribution
        reads its bounds from the device when it is made; this reads nothing.
        """
        before, squash = loc + noise * scale, SafeTanhTransform()
        action = squash(before)
        density = Normal(loc, scale, validate_args=False).log_prob(before)
        return action, (density - squash.log_abs_det_jacobian(before, action)).sum(-1)


class GaussianPolicy(ProbabilisticActor):
    """pi(a|s) = Normal(mean(s), std), the policy of the paper's control runs (Appendix F).

    Three hidden layers of 256 with ReLU, mean = tanh of the last layer, one log-std per action
    dimension that does not depend on the state, clamped to [-5, 2], and a plain Normal around the
    mean: actions of the data at the bounds -1 and 1 have a finite density.

    Called on a TensorDict with ``observation`` ``[*, obs]`` it writes ``action`` ``[*, act]``;
    ``log_prob(trajectories)`` gives one number per step in any layout.

    Args:
        observation_dim, action_dim: Sizes of observation and action; actions are in [-1, 1].
        hidden: Units of the hidden layers.
        squash: Whether to use a tanh-Normal: a tanh after sampling, none on the mean. The
            log-density of an action outside of [-1, 1] raises a ValueError.
        state_dependent_std: Whether a second head gives the log-std of each state.
        log_std_bounds: Range to which the log-std is clamped.
        log_std_init: Log-std at the start (the bias of its head when state-dependent).
        in_key, out_key: Keys of observation and action.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        hidden: Sequence[int] = (256, 256, 256),
        squash: bool = False,
        state_dependent_std: bool = False,
        log_std_bounds: tuple[float, float] = (-5.0, 2.0),
        log_std_init: float = 0.0,
        in_key: NestedKey = OBSERVATION,
        out_key: NestedKey = ACTION,
    ) -> None:
        stds = (state_dependent_std, log_std_bounds, log_std_init)
        head = _GaussianHead(observation_dim, action_dim, hidden, squash, *stds)
        super().__init__(
            TensorDictModule(head, in_keys=[in_key], out_keys=["loc", "scale"]),
            in_keys=["loc", "scale"],
            out_keys=[out_key],
            distribution_class=_SquashedNormal if squash else IndependentNormal,
            default_interaction_type=InteractionType.RANDOM,
        )

        self._observation, self._action = in_key, out_key
        self._columns = {in_key: observation_dim, out_key: action_dim}

    def log_prob(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> Tensor:
        """Log-density of the action of each step, as TorchRL's actors have it."""
        check_columns(tensordict, self._columns, self.head.net[0].weight.dtype)
        if args or kwargs or self.head.squash:
            return super().log_prob(tensordict, *args, **kwargs)
        # The same, without a distribution and entries for its parameters.
        return self.head.log_prob(tensordict[self._observation], tensordict[self._action])

    @property
    def head(self) -> _GaussianHead:
        """Network from observations to the parameters of the distribution."""
        return self.module[0].module


class _GaussianHead(nn.Module):
    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        squash: bool,
        state_dependent_std: bool,
        log_std_bounds: tuple[float, float],
        log_std_init: float,
    ) -> None:
        super().__init__()
        check_count("observation_dim", observation_dim)
        check_count("action_dim", action_dim)
        low, high = log_std_bounds
        if not low <= log_std_init <= high or not math.isfinite(high - low):
            raise ValueError(f"{log_std_init=} must lie in {log_std_bounds=}")
        self.squash = squash
        self.log_std_bounds = log_std_bounds
        outputs = 2 * action_dim if state_dependent_std else action_dim
        self.net = mlp(observation_dim, outputs, hidden)
        self.log_std_init = log_std_init
        self.log_std = (
            None if state_dependent_std else nn.Parameter(torch.full((action_dim,), log_std_init))
        )

    def reset_parameters(self) -> None:
        """Set the log-std back to its start; the layers of the net reset themselves."""
        if self.log_std is not None:
            nn.init.constant_(self.log_std, self.log_std_init)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self._mean_and_log_std(observation)
        return mean, log_std.exp().expand_as(mean)

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """Log-density of actions ``[*, act]`` under the Normal, ``[*]``."""
        mean, log_std = self._mean_and_log_std(observation)
        squares = ((action - mean) * (-log_std).exp()).square().sum(-1)
        return -0.5 * squares - (log_std + _LOG_SQRT_2_PI).sum(-1)

    def _mean_and_log_std(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        # One row per step, in any layout.
        steps = observation.reshape(-1, observation.shape[-1])
        if on_host(steps) and len(steps) > _ROWS:
            # In equal parts: the last bits of a product with a single row differ.
            parts = steps.tensor_split(math.ceil(len(steps) / _ROWS))
            out = torch.cat([self.net(part) for part in parts])
        else:
            out = self.net(steps)
        out = out.reshape(*observation.shape[:-1], out.shape[-1])
        if self.log_std is None:
            out, log_std = out.chunk(2, -1)
            log_std = log_std + self.log_std_init
        else:
            log_std = self.log_std
        return out if self.squash else torch.tanh(out), log_std.clamp(*self.log_std_bounds)
