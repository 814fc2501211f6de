"""What is wrong with a command line that tyro refuses, in a line that names option and value."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

# What the annotation of an option without a flag holds.
_POSITIONAL = get_args(tyro.conf.Positional[int])[1]


@dataclass(frozen=True)
class Form:
    """How an option is written: its name, its flags, and its values in words and to be read."""

    name: str
    flags: tuple[str, ...]
    required: bool
    values: str
    read: Callable[[str], object]
    least: int = 1
    most: float = 1

    def takes(self, values: Sequence[str]) -> bool:
        """Whether the option takes these values."""
        try:
            read = [value == "None" or self.read(value) for value in values]
        except ValueError:
            return False
        return self.least <= len(read) <= self.most


def forms(group: type) -> Iterator[Form]:
    """The forms of the options of a dataclass; those of a position have no flags."""
    hints = get_type_hints(group, include_extras=True)
    for each in fields(group):
        kind, *about = get_args(hints[each.name])
        if is_dataclass(kind):
            continue
        aliases = (name for one in about for name in getattr(one, "aliases", None) or ())
        names = [each.name, *aliases, *[f"no-{each.name}"] * (_plain(kind) is bool)]
        positional = _POSITIONAL in (*about, *get_args(kind)[1:])
        flags = () if positional else tuple(flag(name.lstrip("-")) for name in names)
        name = each.name.upper() if positional else flags[0]
        yield Form(name, flags, each.default is MISSING, *_values(_plain(kind)))


def _plain(kind: Any) -> Any:
    """A type without None, and without what is annotated."""
    args = [each for each in get_args(kind) if each is not NoneType]
    inner = get_origin(kind) is Annotated or NoneType in get_args(kind)
    return _plain(args[0]) if inner else kind


def _values(kind: Any) -> tuple[Any, ...]:
    """What values an option of a type takes: in words, how one is read, and how many."""
    choices = get_args(kind)
    if kind is bool:
        return "no value", str, 0, 0
    if get_origin(kind) is Literal:
        return f"one of {', '.join(choices)}", choices.index
    if get_origin(kind) is tuple:
        words, read = _values(choices[0])[:2]
        if ... in choices:
            return f"values, each {words}", read, 0, math.inf
        return f"{len(choices)} values, each {words}", read, len(choices), len(choices)
    return {int: ("a whole number", int), float: ("a number", float)}.get(kind, ("a value", str))


def find_fault(words: Sequence[str], options: Sequence[Form]) -> str | None:
    """What is wrong with the first option that is not as it should be."""
    known = {name: each for each in options for name in each.flags}
    parts: list[list[str]] = [[]]
    for word in words:
        if word.startswith("-") and not Form("", (), False, "", float).takes([word]):
            name, equals, value = word.partition("=")
            parts.append([name.replace("_", "-"), *[value] * bool(equals)])
        else:
            parts[-1].append(word)
    loose, positions = parts[0], [each for each in options if not each.flags]
    for name, *values in parts[1:]:
        if name not in known:
            near = nearest(name, known)
            return f"unknown option {name}" + (f"; did you mean {near}?" if near else "")
        if positions and known[name].most == 1:
            values, loose = values[:1], loose + values[1:]
        if not known[name].takes(values):
            return f"{' '.join([name, *values])}: it takes {known[name].values}"
    for form, word in zip(positions, loose, strict=False):
        if not form.takes([word]):
            return f"{form.name} {word}: it takes {form.values}"
    surplus = loose[len(positions) :]
    return f"unexpected {surplus[0]!r}: options begin with --" if surplus else None


def find_missing(words: Sequence[str], options: Iterable[Form]) -> str:
    """The first option that must be given and is not."""
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    for form in options:
        if form.required and given.isdisjoint(form.flags):
            return f"{form.name} is missing: it takes {form.values}"
    return f"can't read {' '.join(words)}"


def flag(name: str) -> str:
    """The flag of an option."""
    return f"--{name.replace('_', '-')}"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The nearest of some names: as an abbreviation, by its letters, or by a word of it."""
    plain = {each.strip("-").replace("_", "-"): each for each in names}
    word = name.strip("-").replace("_", "-").lower()
    near = [each for each in plain if word == "".join(part[:1] for part in each.split("-"))]
    near += difflib.get_close_matches(word, plain, n=1)
    near += [each for each in plain if not set(word.split("-")).isdisjoint(each.split("-"))]
    return plain[near[0]] if near else None
