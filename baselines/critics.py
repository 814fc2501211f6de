"""Value networks that the critics share: Q(s, a), V(s), and ensembles of them in one product.

A network follows TorchRL's conventions: it reads ``observation`` (and ``action``), and writes
``state_action_value`` (``state_value``) ``[*, 1]``. It uses its own parameters, or those of E
networks stacked along a first dimension; then it writes ``[E, *, 1]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn import functional
from torchrl.objectives import SoftUpdate
from torchrl.objectives.common import LossModule

from iwsft.trajectory import ACTION, NEXT_OBSERVATION, OBSERVATION, REWARD, validate

STATE_ACTION_VALUE: NestedKey = "state_action_value"
STATE_VALUE: NestedKey = "state_value"
_CLOSURES = ("_vmap_qvalue_network", "_vmap_actor_network")
# How many times any return that the rewards allow a critic must reach to count as diverged.
_MARGIN = 10.0


class ValueMLP(nn.Module):
    """Linear layers with ReLU between them, one number out; inputs are concatenated.

    Args:
        inputs: Size of all inputs together.
        hidden: Units of the hidden layers.

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(self, inputs: int, hidden: Sequence[int] = (256, 256)) -> None:
        super().__init__()
        sizes = (inputs, *hidden, 1)
        if min(sizes) < 1:
            raise ValueError(f"sizes must be positive: {inputs} inputs, hidden={tuple(hidden)}")
        self.layers = nn.ModuleList(
            _Linear(i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True)
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return ``[*, 1]``; with stacked parameters, ``[E, *, 1]``."""
        parameters = [getattr(x, name) for x in self.layers for name in ("weight", "bias")]
        return self.evaluate(parameters, *inputs)

    @staticmethod
    def evaluate(parameters: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        """Return the same with given parameters: weight, bias, weight, bias, ..."""
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        shape, stacked = x.shape[:-1], parameters[0].ndim == 3
        if stacked:
            # Features first: a weight's gradient then needs no copy into the weight's layout.
            x = x.reshape(-1, x.shape[-1]).mT.expand(len(parameters[0]), -1, -1)
        for i in range(0, len(parameters), 2):
            weight, bias = parameters[i : i + 2]
            if i:
                x = functional.relu(x, inplace=True)
            if stacked:
                x = torch.baddbmm(bias.unsqueeze(-1), weight, x)
            else:
                x = functional.linear(x, weight, bias)
        return x.reshape(-1, *shape, 1) if stacked else x


class _Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Draw them as ``nn.Linear`` does, for each of stacked networks."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)


def qvalue_network(
    observation_dim: int, action_dim: int, hidden: Sequence[int] = (256, 256)
) -> TensorDictModule:
    """Return Q(s, a), which reads ``observation`` and ``action`` and writes ``state_action_value``.

    A loss should get a *list* of independently made networks (:func:`qvalue_networks`). From a
    single network TorchRL makes the others by drawing each parameter uniformly over its range,
    which is not the layer's own initialisation.
    """
    return TensorDictModule(
        ValueMLP(observation_dim + action_dim, hidden),
        in_keys=[OBSERVATION, ACTION],
        out_keys=[STATE_ACTION_VALUE],
    )


def qvalue_networks(
    observation_dim: int, action_dim: int, hidden: Sequence[int] = (256, 256), *, count: int = 2
) -> list[TensorDictModule]:
    """Return independently initialised Q-networks, an ensemble for a loss."""
    return [qvalue_network(observation_dim, action_dim, hidden) for _ in range(count)]


def value_network(observation_dim: int, hidden: Sequence[int] = (256, 256)) -> TensorDictModule:
    """Return V(s), which reads ``observation`` and writes ``state_value``."""
    return TensorDictModule(
        ValueMLP(observation_dim, hidden), in_keys=[OBSERVATION], out_keys=[STATE_VALUE]
    )


def values(network: TensorDictModule, inputs: TensorDictBase, params: TensorDictParams) -> Tensor:
    """Return the output of a network with given parameters, without its last dimension 1.

    The numbers are those of ``params.to_module(network)`` and a call, or of TorchRL's ``vmap`` over
    stacked parameters. This takes a fraction of the time: no module is touched, and E networks are
    one batched product.

    Args:
        network: A network of this file.
        inputs: The network's inputs, with batch size ``[*]``.
        params: Parameters of one network, or of E networks with batch size ``[E]``.

    Returns:
        ``[*]``, or ``[E, *]``.

    Raises:
        TypeError: The network is not of this file.
    """
    mlp = network.module
    if not isinstance(mlp, ValueMLP):
        raise TypeError(
            f"a network of baselines.critics is needed, not a {type(mlp).__name__}; TorchRL's own "
            "loss takes any"
        )
    # By name, because the order of a TensorDict's entries is not guaranteed.
    layers = [params.get(("module", "layers", str(i))) for i in range(len(mlp.layers))]
    parameters = [layer.get(name) for layer in layers for name in ("weight", "bias")]
    return mlp.evaluate(parameters, *(inputs.get(key) for key in network.in_keys)).squeeze(-1)


class CopyableLoss(LossModule):
    """A TorchRL loss that ``deepcopy`` and ``pickle`` copy whole.

    TorchRL keeps networks that hold the parameters, and closures over its modules. In a copy they
    would belong to the original; so a copy makes its own.
    """

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without caches and closures."""
        state = {name: x for name, x in vars(self).items() if not name.startswith(_CLOSURES)}
        return state | {"_cache": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore :meth:`__getstate__`."""
        super().__setstate__(state)
        self._make_vmap()


class TargetUpdate(SoftUpdate):
    """TorchRL's ``SoftUpdate``, one tensor at a time: a third of its time on small networks.

    Args:
        loss: The loss whose ``target_..._params`` follow.
        tau: Share of the networks in the moving average.
    """

    def __init__(self, loss: LossModule, *, tau: float) -> None:
        super().__init__(loss, tau=tau)

    @torch.no_grad()
    def _step(self, p_source: TensorDictBase, p_target: TensorDictBase) -> None:
        for key, target in p_target.items(include_nested=True, leaves_only=True):
            target.lerp_(p_source.get(key), 1 - self.eps)


def check_transitions(trajectories: TensorDictBase) -> tuple[tuple[int, int], torch.device]:
    """Check that a critic can learn from packed trajectories.

    Returns:
        The sizes of observation and action, and the device.

    Raises:
        KeyError: An entry of a transition is missing.
        ValueError: Entries are not finite.
    """
    validate(trajectories, keys=(OBSERVATION, ACTION, NEXT_OBSERVATION, REWARD))
    observation, action = trajectories.get(OBSERVATION), trajectories.get(ACTION)
    return (observation.shape[-1], action.shape[-1]), observation.device


def return_limit(trajectories: TensorDictBase, gamma: float) -> float:
    """Return the absolute value beyond which a critic has diverged.

    It is ten times the largest discounted return possible, ``max |r| / (1 - gamma)``, plus ten for
    the outputs of an untrained network where rewards are close to 0.
    """
    if gamma >= 1:
        return math.inf
    largest = float(trajectories.get(REWARD).abs().max())
    return _MARGIN * (1 + largest / (1 - gamma))
