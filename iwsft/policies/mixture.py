"""A mixture of Gaussians over continuous actions, for data with several ways to act in a state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torchrl.modules import ProbabilisticActor

from iwsft.policies.linear import mlp
from iwsft.policies.log_prob import check_columns
from iwsft.trajectory import ACTION, OBSERVATION
from iwsft.validation import check_count

_LOG_STD_BOUNDS = (-5.0, 2.0)
# Largest offset of a mean before the tanh: 0.9 after it.
_SPREAD = 1.5


class _NormalMixture(MixtureSameFamily):
    """Mixture of Normals ``[*, components, act]`` with logits ``[*, components]``."""

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor) -> None:
        parts = Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)
        mixture = Categorical(logits=logits, validate_args=False)
        super().__init__(mixture, parts, validate_args=False)

    @property
    def deterministic_sample(self) -> Tensor:
        """Mean of the heaviest component."""
        means, logits = self.component_distribution.mean, self.mixture_distribution.logits
        best = logits.argmax(-1)[..., None, None].expand(*means.shape[:-2], 1, means.shape[-1])
        return means.gather(-2, best).squeeze(-2)


class MixturePolicy(ProbabilisticActor):
    """pi(a|s) = sum_k weight_k(s) Normal(mean_k(s), std_k), an alternative to GaussianPolicy.

    Layers, bounds of means and log-stds are those of :class:`~iwsft.GaussianPolicy`, and so is the
    use. The net also gives the weights of the components. At the start their means are spread over
    the actions and their stds are 0.37: equal components would stay equal for long. Under
    ``ExplorationType.DETERMINISTIC`` the action is the mean of the heaviest component.

    ``components`` is the number of Gaussians; the other arguments are those of GaussianPolicy.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        components: int = 5,
        hidden: Sequence[int] = (256, 256, 256),
        in_key: NestedKey = OBSERVATION,
        out_key: NestedKey = ACTION,
    ) -> None:
        check_count("observation_dim", observation_dim)
        check_count("action_dim", action_dim)
        check_count("components", components)
        head = _MixtureHead(observation_dim, action_dim, components, hidden)
        keys = ["logits", "loc", "scale"]
        super().__init__(
            TensorDictModule(head, in_keys=[in_key], out_keys=keys),
            in_keys=keys,
            out_keys=[out_key],
            distribution_class=_NormalMixture,
            default_interaction_type=InteractionType.RANDOM,
        )
        self.components = components
        self._columns = {in_key: observation_dim, out_key: action_dim}

    def log_prob(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> Tensor:
        """Log-density of the action of each step, as TorchRL's actors have it."""
        check_columns(tensordict, self._columns, self.module[0].module.net[0].weight.dtype)
        return super().log_prob(tensordict, *args, **kwargs)


class _MixtureHead(nn.Module):
    def __init__(
        self, observation_dim: int, action_dim: int, components: int, hidden: Sequence[int]
    ) -> None:
        super().__init__()
        self.net = mlp(observation_dim, components * (1 + action_dim), hidden, nn.Linear)
        self.offset = nn.Parameter(torch.empty(components, action_dim))
        self.log_std = nn.Parameter(torch.empty(components, action_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the offsets, set the log-stds; the layers of the net reset themselves."""
        nn.init.uniform_(self.offset, -_SPREAD, _SPREAD)
        nn.init.constant_(self.log_std, -1.0)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        components = len(self.log_std)
        out = self.net(observation)
        logits, mean = out[..., :components], out[..., components:]
        mean = (mean.unflatten(-1, self.log_std.shape) + self.offset).tanh()
        return logits, mean, self.log_std.clamp(*_LOG_STD_BOUNDS).exp().expand_as(mean)
