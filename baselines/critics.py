"""Value networks that the critics share: Q(s, a), V(s), and ensembles of them in one call.

A network follows TorchRL's conventions: it reads ``observation`` (and ``action``), and writes
``state_action_value`` (``state_value``) ``[*, 1]``. It uses its own parameters, or those of E
networks stacked along a first dimension; then it writes ``[E, *, 1]``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import NestedKey, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torch.nn import functional
from torchrl.objectives import SoftUpdate
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import TargetNetUpdater

from baselines.learner import Learner, check_finite, read_steps
from iwsft.policies.linear import linear, suit_onednn
from iwsft.samplers import TRANSITION, TransitionSampler
from iwsft.training import Schedule
from iwsft.trajectory import ACTION, NEXT_OBSERVATION, OBSERVATION, REWARD, Segments

STATE_ACTION_VALUE: NestedKey = "state_action_value"
STATE_VALUE: NestedKey = "state_value"
# Added to the variance; flax's, with which ReBRAC was published.
_LAYER_NORM_EPS = 1e-6
_CLOSURES = ("_vmap_qvalue_network", "_vmap_actor_network")
# How many times any return that the rewards allow a critic must reach to count as diverged.
_MARGIN = 10.0
# Parameters of a layer; the last two are those of a layer norm.
_NAMES = ("weight", "bias", "scale", "shift")


@dataclass(frozen=True)
class CriticSettings:
    """Settings of a run that algorithms with a critic share.

    Args:
        steps: Number of updates.
        batch_size: Transitions of an update.
        gamma: Discount factor.
        tau: Share of the networks in their targets' moving average.
    """

    # The setting that may be infinite.
    unlimited: ClassVar[str] = ""

    steps: int = 1_000_000
    batch_size: int = 256
    gamma: float = 0.99
    tau: float = 0.005

    def __post_init__(self) -> None:
        check_finite(self, but=self.unlimited)
        if not 0 <= self.gamma < 1 or not 0 < self.tau <= 1:
            raise ValueError(f"{self}: gamma must be in [0, 1), tau in (0, 1]")


class ValueMLP(nn.Module):
    """Linear layers with ReLU between them, one number out; inputs are concatenated.

    Args:
        inputs: Size of all inputs together.
        hidden: Units of the hidden layers.
        layer_norm: Whether a layer norm follows each ReLU.
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int] = (256, 256), *, layer_norm: bool = False
    ) -> None:
        super().__init__()
        sizes = (inputs, *hidden)
        if min(sizes) < 1:
            raise ValueError(f"sizes must be positive: {inputs} inputs, hidden={tuple(hidden)}")
        layers = [_Linear(i, o, norm=layer_norm) for i, o in itertools.pairwise(sizes)]
        self.layers = nn.ModuleList([*layers, _Linear(sizes[-1], 1)])

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return ``[*, 1]``; with stacked parameters, ``[E, *, 1]``."""
        layers = [[getattr(x, name) for name in _NAMES if hasattr(x, name)] for x in self.layers]
        return self.evaluate(layers, *inputs)

    @staticmethod
    def evaluate(layers: Sequence[Sequence[Tensor]], *inputs: Tensor) -> Tensor:
        """Return the same with given parameters of each layer."""
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
        rows, shape = x.reshape(-1, x.shape[-1]), x.shape[:-1]
        first = layers[0][0]
        if first.ndim == 2:
            return ValueMLP._one(layers, rows).reshape(*shape, 1)
        if len(layers[0]) > 2 or suit_onednn(rows):
            # One by one: torch's layer norm and oneDNN's product take one network.
            unstacked = [zip(*(p.unbind() for p in layer), strict=True) for layer in layers]
            members = [ValueMLP._one(member, rows) for member in zip(*unstacked, strict=True)]
            return torch.stack(members).reshape(len(first), *shape, 1)
        # Features first: a weight's gradient then needs no copy into the weight's layout.
        x = rows.mT.expand(len(first), -1, -1)
        for i, (weight, bias) in enumerate(layers, 1):
            x = torch.baddbmm(bias.unsqueeze(-1), weight, x)
            x = functional.relu(x, inplace=True) if i < len(layers) else x
        return x.reshape(len(first), *shape, 1)

    @staticmethod
    def _one(layers: Sequence[Sequence[Tensor]], x: Tensor) -> Tensor:
        """Return the output ``[N, 1]`` of one network for rows ``[N, inputs]``."""
        *hidden, last = layers
        for weight, bias, *norm in hidden:
            x = functional.relu(linear(x, weight, bias), inplace=True)
            if norm:
                x = functional.layer_norm(x, x.shape[-1:], norm[0], norm[1], _LAYER_NORM_EPS)
        # MKL is faster for a single output.
        return functional.linear(x, *last)


class _Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int, *, norm: bool = False) -> None:
        super().__init__(inputs, outputs)
        if norm:
            self.scale = nn.Parameter(torch.ones(outputs))
            self.shift = nn.Parameter(torch.zeros(outputs))

    def reset_parameters(self) -> None:
        """Draw them as ``nn.Linear`` does, for each of stacked networks."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)


def qvalue_networks(
    observation_dim: int,
    action_dim: int,
    hidden: Sequence[int] = (256, 256),
    *,
    count: int = 2,
    layer_norm: bool = False,
) -> list[TensorDictModule]:
    """Return independent Q(s, a), which read ``observation`` and ``action``, for a loss.

    They write ``state_action_value``. From a single network TorchRL makes the others by drawing
    each parameter uniformly over its range, which is not the layer's own initialisation.
    """
    networks = [
        ValueMLP(observation_dim + action_dim, hidden, layer_norm=layer_norm) for _ in range(count)
    ]
    keys = {"in_keys": [OBSERVATION, ACTION], "out_keys": [STATE_ACTION_VALUE]}
    return [TensorDictModule(network, **keys) for network in networks]


def value_network(observation_dim: int, hidden: Sequence[int] = (256, 256)) -> TensorDictModule:
    """Return V(s), which reads ``observation`` and writes ``state_value``."""
    return TensorDictModule(
        ValueMLP(observation_dim, hidden), in_keys=[OBSERVATION], out_keys=[STATE_VALUE]
    )


def values(network: TensorDictModule, inputs: TensorDictBase, params: TensorDictParams) -> Tensor:
    """Return the output ``[*]`` of a network of this file with given parameters.

    With the parameters of E networks, of batch size ``[E]``, it is ``[E, *]``. The numbers are
    those of ``params.to_module(network)`` and a call, or of TorchRL's ``vmap``. This takes a
    fraction of the time: no module is touched, and E networks are one batched product, or oneDNN's
    products one by one where that is faster (:func:`iwsft.policies.linear.suit_onednn`).
    """
    mlp = network.module
    if not isinstance(mlp, ValueMLP):
        raise TypeError(
            f"a network of baselines.critics is needed, not a {type(mlp).__name__}; TorchRL's own "
            "loss takes any"
        )
    # By name, because the order of a TensorDict's entries is not guaranteed.
    layers = [params.get(("module", "layers", str(i))) for i in range(len(mlp.layers))]
    parameters = [
        [x for name in _NAMES if (x := layer.get(name, None)) is not None] for layer in layers
    ]
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
    """TorchRL's ``SoftUpdate`` without TensorDicts: a third of its time on small networks."""

    @torch.no_grad()
    def _step(self, p_source: TensorDictBase, p_target: TensorDictBase) -> None:
        pairs = p_target.items(include_nested=True, leaves_only=True)
        targets, sources = zip(*[(x, p_source.get(key)) for key, x in pairs], strict=True)
        torch._foreach_lerp_(targets, sources, 1 - self.eps)


def read_transitions(
    trajectories: TensorDictBase,
) -> tuple[TensorDictBase, tuple[int, int], torch.device]:
    """Check that a critic can learn from packed trajectories, see :func:`read_steps`.

    Returns:
        What a baseline reads, the sizes of observation and action, and the device.
    """
    data = read_steps(trajectories, (OBSERVATION, ACTION, NEXT_OBSERVATION, REWARD))
    observation, action = data.get(OBSERVATION), data.get(ACTION)
    return data, (observation.shape[-1], action.shape[-1]), observation.device


def critic_learner(
    policy: TensorDictModuleBase,
    loss: LossModule,
    data: TensorDictBase,
    settings: CriticSettings,
    *,
    seed: int,
    rates: Mapping[str, float],
    cosine: Sequence[str] = (),
    updater: TargetNetUpdater | None = None,
    keys: Sequence[NestedKey] = TRANSITION,
) -> Learner:
    """Return the learner of a loss with ``pred_value`` on single transitions.

    ``rates`` are the learning rates of the networks; those of ``cosine`` fall to 0, the others are
    constant. Targets follow at every update if there is no ``updater``.
    """
    return Learner(
        policy=policy,
        loss=loss,
        sampler=TransitionSampler(data, settings.batch_size, seed=seed, keys=keys),
        schedule={
            name: Schedule(settings.steps, lr, decay="cosine" if name in cosine else "constant")
            for name, lr in rates.items()
        },
        updater=TargetUpdate(loss, tau=settings.tau) if updater is None else updater,
        limits={"pred_value": return_limit(data, settings.gamma)},
    )


def return_limit(trajectories: TensorDictBase, gamma: float) -> float:
    """Return the absolute value beyond which a critic has diverged.

    It is ten times the largest discounted return possible, ``max |r| / (1 - gamma)`` over valid
    steps, plus ten for the outputs of an untrained network where rewards are close to 0.
    """
    valid = Segments.of(trajectories).valid
    largest = float(trajectories.get(REWARD)[valid].abs().max())
    return _MARGIN * (1 + largest / (1 - gamma))
