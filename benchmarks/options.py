"""Command lines, config files, and the checks of options that all commands share.

Nothing heavy is imported, so that a wrong option is told at once. Checks raise a ValueError with
the way out.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

Parsed = TypeVar("Parsed")


def called_as(command: str) -> str:
    """The name by which the user called a command, such as ``python -m benchmarks.d4rl``.

    ``benchmarks.__main__`` leaves its own name and that of the command in ``sys.argv[0]``.
    """
    name, last = sys.argv[0], command.split()[-1]
    if not name.startswith(("iwsft ", "python -m ")):
        return f"python -m benchmarks.{command}"
    return name if name.endswith(f" {last}") else f"{name} {last}"


def option(metavar: str | None = None, default: str | None = None, **rest: Any) -> Any:
    """Describe an option to the help; ``default`` says in words what None leaves it at."""
    hint = None if default is None else f"(default: {default})"
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint, **rest)


def parse(
    kind: type[Parsed],
    command: str,
    description: str | None,
    words: Sequence[str] | None = None,
    default: Parsed | None = None,
) -> Parsed:
    """Read a command line into a dataclass; an error ends the process with status 2.

    The examples of ``description`` begin with ``python -m benchmarks.COMMAND``. The help has the
    name that the user called instead.
    """
    prog = called_as(command)
    text = (description or "").replace(f"python -m benchmarks.{command}", prog)
    words = sys.argv[1:] if words is None else words
    # None is no default to tyro.
    start: Any = default
    parsed: Parsed = tyro.cli(kind, prog=prog, args=words, description=text, default=start)
    return parsed


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
    import torch

    try:
        torch.ones(1, device=device).item()
    # torch raises these for unknown names and for devices that are not there.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {device} can't be used here: {reason}; cpu can") from error
