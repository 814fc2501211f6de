"""Rows of a speed table, and how two ways are timed beside each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import tyro

Scale = Literal["paper", "small"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What all subjects take."""

    dataset: Annotated[Path | None, tyro.conf.arg(metavar="FILE.hdf5")] = None
    """Dataset in D4RL's layout; by default synthetic data of the paper's shape."""
    repeats: int = 3
    """Repeats of each way, in turn; the median counts."""
    scale: Scale = "paper"
    """Sizes of the paper, or small ones that only show that everything runs."""
    seed: int = 0
    """Of data, parameters and draws."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats}: one is the least")


@dataclass(frozen=True)
class Row:
    """One comparison: ``ratio`` = peer / ours, above 1 where ours is faster or smaller."""

    name: str
    ours: float
    peer: float
    unit: str
    peer_name: str
    ratio: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", self.peer / self.ours)


@dataclass(frozen=True)
class Check:
    """A figure that must not pass its limit, or the rows beside it compare different things."""

    name: str
    value: float
    limit: float


class DisagreementError(RuntimeError):
    """Ours and the peer do not compute the same."""


def checked(name: str, value: float, limit: float) -> Check:
    """The check.

    Raises:
        DisagreementError: ``value`` is over ``limit`` or not a number.
    """
    if not value <= limit:
        raise DisagreementError(
            f"{name} is {value:.3g}, more than {limit:.3g}: the two ways do not compute the same, "
            "so their times can't be compared; nothing was written"
        )
    return Check(name, value, limit)


@dataclass(frozen=True)
class Times:
    """Processor seconds of each repeat: on one thread, wall time less what others take."""

    ours: list[float]
    peer: list[float]

    def row(
        self,
        name: str,
        peer_name: str,
        unit: Literal["s", "ms", "us"],
        of: str,
        *,
        per: float = 1.0,
        ours_per: float | None = None,
    ) -> Row:
        """Medians over the repeats.

        Args:
            name: of the comparison.
            peer_name: what it is compared with.
            unit: ``s``, ``ms`` or ``us``.
            of: what the time is for, put after the unit.
            per: divides the seconds: updates or steps of a repeat.
            ours_per: the same for ours, where it differs.
        """
        factor = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
        ours = factor * median(self.ours) / (per if ours_per is None else ours_per)
        peer = factor * median(self.peer) / per
        return Row(name, ours, peer, f"CPU {unit} {of}", peer_name)


def paired(
    ours: Callable[[], object],
    peer: Callable[[], object],
    repeats: int,
    *,
    before: Callable[[], object] = lambda: None,
) -> Times:
    """Time two ways in turn (ours, peer, ours, peer, ...), so that both see the same machine.

    Args:
        ours: one repeat of ours; call it once before, for what only the first call costs.
        peer: one repeat of the peer.
        repeats: of each.
        before: called untimed before each repeat of the two.
    """
    times = Times([], [])
    for _ in range(repeats):
        before()
        times.ours.append(_seconds(ours))
        times.peer.append(_seconds(peer))
    return times


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start
