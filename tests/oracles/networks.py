"""Networks of the plain implementations: ``nn.Sequential`` with given weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from tensordict import TensorDictBase, TensorDictParams
from torch import Tensor, nn
from torchrl.objectives.common import LossModule

Networks = Mapping[str, Sequence[nn.Module]]


class PlainLearner(Protocol):
    """A baseline in plain torch, made from a learner of ours and its settings."""

    @property
    def networks(self) -> Networks:
        """The networks by the name that our loss gives them, such as ``target_qvalue_network``."""

    def update(self, batch: TensorDictBase) -> None:
        """Make one update, as the paper states it, on a TensorDict of transitions."""


class PlainGaussian(nn.Module):
    """A normal distribution of actions around the output of a network.

    Args:
        mean: Network from states to mean actions.
        log_std: First value of the free log-deviations ``[act]``.
    """

    def __init__(self, mean: nn.Module, log_std: Tensor) -> None:
        super().__init__()
        self.log_std = nn.Parameter(log_std.detach().clone())
        self.mean = mean

    @classmethod
    def of_sizes(cls, observation_dim: int, action_dim: int) -> PlainGaussian:
        """Return an untrained policy of the architecture of :class:`iwsft.GaussianPolicy`."""
        sizes = (observation_dim, 256, 256, 256, action_dim)
        layers = [
            layer
            for i, o in zip(sizes[:-1], sizes[1:], strict=True)
            for layer in (nn.Linear(i, o), nn.ReLU())
        ]
        return cls(nn.Sequential(*layers[:-1], nn.Tanh()), torch.zeros(action_dim))

    def forward(self, observation: Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(
            self.mean(observation), self.log_std.clamp(-5, 2).exp(), validate_args=False
        )

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        """Return the log-density of each action ``[...]``."""
        return self(observation).log_prob(action).sum(-1)

    @torch.no_grad()
    def copy_(self, parameters: Iterable[Tensor]) -> None:
        """Take the values of ``parameters``, log-deviations first, then the layers in order."""
        for mine, given in zip(self.parameters(), parameters, strict=True):
            mine.copy_(given)


def leaves(params: TensorDictParams, member: int | None = None) -> list[Tensor]:
    """Return the parameters of a network, or of an ensemble's member, in the order of layers."""
    tensors = params.values(include_nested=True, leaves_only=True)
    return [(x if member is None else x[member]).detach() for x in tensors]


def mlp(parameters: Sequence[Tensor], *end: nn.Module) -> nn.Sequential:
    """Return linear layers with copies of given parameters, and ReLU between them.

    Args:
        parameters: Weight and bias of each layer; those of the layer norm after its ReLU follow,
            where it has one.
        end: Modules after the last layer.
    """
    modules: list[nn.Module] = []
    for i, weight in enumerate(parameters):
        if weight.ndim == 2:
            modules.append(nn.Linear(weight.shape[1], weight.shape[0], device=weight.device))
            modules.append(nn.ReLU())
            if i + 2 < len(parameters) and parameters[i + 2].ndim == 1:
                modules.append(nn.LayerNorm(len(weight), eps=1e-6, device=weight.device))
    net = nn.Sequential(*modules[:-1], *end)
    with torch.no_grad():
        for mine, given in zip(net.parameters(), parameters, strict=True):
            mine.copy_(given)
    return net


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Set ``target`` to ``(1 - tau) target + tau source``."""
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        old.mul_(1 - tau).add_(new, alpha=tau)


def disagreement(networks: Networks, loss: LossModule) -> float:
    """Return the largest difference between a parameter of the plain networks and of our loss."""
    largest = 0.0
    for name, members in networks.items():
        params = getattr(loss, f"{name}_params")
        for i, network in enumerate(members):
            ours = leaves(params, i if params.ndim else None)
            for a, b in zip(ours, network.parameters(), strict=True):
                largest = max(largest, float((a - b.detach()).abs().max()))
    return largest
