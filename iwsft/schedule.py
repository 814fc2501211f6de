"""Learning rates: schedules, and the optimizer whose groups follow them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor
from torchrl.objectives.common import LossModule

from iwsft.weights import check_number


@dataclass(frozen=True)
class Schedule:
    """Updates and their learning rate (paper, Appendix F).

    Args:
        steps: Number of updates.
        lr: Peak of Adam's learning rate.
        warmup: Number of updates of linear warm-up from 0, fewer than ``steps``.
        decay: Learning rate after the warm-up: ``"cosine"`` to 0, or ``"constant"``.
        weight_decay: Weight decay, decoupled from the gradient as in AdamW.
        clip_norm: Largest norm of the gradient; a longer one is scaled down to it.
    """

    steps: int
    lr: float
    warmup: int = 0
    decay: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.0
    clip_norm: float = math.inf

    def __post_init__(self) -> None:
        if not (isinstance(self.steps, Integral) and isinstance(self.warmup, Integral)):
            raise ValueError(f"{self}: steps and warmup must be whole numbers (10000, not 1e4)")
        for name in ("lr", "weight_decay", "clip_norm"):
            # YAML reads 1e-3, without a point, as text.
            check_number(f"{self}: {name}", getattr(self, name))
        if self.steps < 1 or not 0 < self.lr < math.inf or self.warmup < 0:
            raise ValueError(f"{self}: steps and lr must be positive, warmup not negative")
        # The update after the warm-up is the first one with the learning rate lr.
        if self.warmup >= self.steps:
            raise ValueError(f"{self}: a warm-up of all updates never reaches lr; shorten it")
        if not (0 <= self.weight_decay < math.inf and self.clip_norm > 0):
            raise ValueError(f"{self}: weight_decay must not be negative, clip_norm positive")
        if self.decay not in ("cosine", "constant"):
            raise ValueError(f"{self}: decay must be 'cosine' or 'constant'")

    def factor(self, step: int) -> float:
        """Return the share of ``lr`` at update ``step`` (from 0)."""
        if step < self.warmup:
            return step / self.warmup
        if self.decay == "constant":
            return 1.0
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def by_network(schedule: Schedule | Mapping[str, Schedule]) -> Mapping[str, Schedule]:
    """Return the schedule of each network, by the start of its parameters' names; "" starts all."""
    schedules = schedule if isinstance(schedule, Mapping) else {"": schedule}
    for each in schedules.values():
        if not isinstance(each, Schedule):
            raise TypeError(f"schedule={each!r:.60} must be a Schedule(steps, lr)")
    if len({network.steps for network in schedules.values()}) != 1:
        raise ValueError(f"all networks need the same number of steps: {schedules}")
    return schedules


def course_of(schedules: Mapping[str, Schedule]) -> dict[str, Any]:
    """Return what learning rates depend on: not on the length of a constant schedule."""
    course = {name or "all": asdict(network) for name, network in schedules.items()}
    for values in course.values():
        if values["decay"] == "constant":
            del values["steps"]
    return course


def make_optimizer(
    loss: LossModule, schedules: Mapping[str, Schedule], *, capturable: bool
) -> torch.optim.Adam:
    """Return Adam with a group for each schedule, whose parameters' names start with its name."""
    groups: dict[str, dict[str, Any]] = {
        name: {"params": [], "lr": network.lr, "weight_decay": network.weight_decay}
        for name, network in schedules.items()
    }
    for name, parameter in loss.named_parameters():
        # Functional losses name a network's parameters "NETWORK_params".
        owners = [network for network in schedules if name.startswith(network)]
        if not owners:
            raise ValueError(f"parameter {name!r} has no schedule (of {', '.join(schedules)})")
        # "log_alpha" is also the start of "log_alpha_prime".
        groups[max(owners, key=len)]["params"].append(parameter)
    empty = [name for name, group in groups.items() if not group["params"]]
    if empty:
        raise ValueError(f"{type(loss).__name__} has no parameters under {', '.join(empty)}")
    return torch.optim.Adam(
        [*groups.values()], decoupled_weight_decay=True, fused=True, capturable=capturable
    )


def set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Set the learning rate of each group, on a GPU in a tensor and without waiting for it."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        device = group["params"][0].device
        if device.type != "cuda":
            group["lr"] = rate
        elif isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            # Fused Adam reads a rate in float32, whatever the dtype of the parameters.
            group["lr"] = torch.tensor(rate, dtype=torch.float32, device=device)
