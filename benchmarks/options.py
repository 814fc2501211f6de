"""The checks of options that all commands share; each raises a ValueError with the way out."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch


def flag(name: str) -> str:
    """The flag of an option."""
    return f"--{name.replace('_', '-')}"


def check_at_least(least: int, **numbers: int | None) -> None:
    """Check options that are numbers; None is an option that was left out."""
    for name, number in numbers.items():
        if number is not None and number < least:
            raise ValueError(f"{flag(name)} {number}: at least {least}")


def check_known(kind: str, name: str, known: Sequence[str]) -> None:
    """Check the name of a ``kind`` of things; the error tells the nearest one that is known."""
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown {kind} {name!r}; {hint}it is one of {', '.join(known)}")


def check_once(**lists: Sequence[object]) -> None:
    """Check options that are lists: at least one value, and none of them twice."""
    for name, values in lists.items():
        if not values:
            raise ValueError(f"nothing to run: pass at least one value to {flag(name)}")
        twice = sorted({str(value) for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(f"{flag(name)} {' '.join(twice)}: asked for twice; name each once")


def check_seeds(seeds: Sequence[int], name: str = "seeds") -> None:
    """Check seeds: whole numbers that NumPy and torch take, each once."""
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise ValueError(f"{flag(name)} {seed}: a seed lies in 0 ... 2^32 - 1")
    check_once(**{name: seeds})


def check_used(name: str, value: object, used: bool, where: str) -> None:
    """Check that an option has an effect; ``where`` says where it has none, as in "in bc"."""
    if value is not None and not used:
        raise ValueError(f"{flag(name)} {value} changes nothing {where}; leave it out")


def check_device(device: str) -> None:
    """Check that torch knows a device, and that it is there."""
    try:
        torch.ones(1, device=device).item()
    # torch raises these for unknown names and for devices that are not there.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {device} can't be used here: {reason}; cpu can") from error
