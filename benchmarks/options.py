"""Command lines, config files, and the checks of options that all commands share.

Nothing heavy is imported, so that a wrong option is told at once. Checks raise a ValueError with
the way out.
"""

from __future__ import annotations

import argparse
import difflib
import io
import itertools
import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import docstring_parser
import tyro

from benchmarks.commands import program
from benchmarks.stopping import ends_in_one_line
from iwsft import extras

# Experiment trackers of --report-to; each is the name of its package, too.
TRACKERS = ("tensorboard", "wandb", "trackio")
# tyro's heading of the help of an option that it can't read.
_OF_ARGUMENT = "Argument helptext:"
# Endings of the files that commands read.
_FILES = (".jsonl", ".json", ".parquet", ".hdf5", ".h5", ".npz")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w.-]+)?")
# Options that belong to a command.
_FIXED = re.compile(r"--(\S+) (\S+)")
Parsed = TypeVar("Parsed")


def option(
    metavar: str | None = None, unset: str = "none", source: str = "default", **rest: Any
) -> Any:
    """Describe an option to the help.

    ``unset`` says in words what a default of None, or an empty one, leaves the option at.
    ``source`` says where the default is from.
    """

    def hint(default: str) -> str:
        return f"({source}: {unset if default in ('None', '', repr('')) else default})"

    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint, **rest)


_CONFIG = option(
    "FILE",
    "none",
    help="File of options, YAML or JSON: your own, or the config.json of a run. The options of the "
    "command line override those of the file.",
)


def parse(
    kind: type[Parsed], command: str, description: str | None, words: Sequence[str] | None = None
) -> Parsed:
    """Read a command line into a dataclass, see :func:`parse_groups`."""
    groups = groups_of(kind)
    values = parse_groups(groups, command, description, words, defaults_of(groups))
    with ends_in_one_line():
        return kind(**values)


def groups_of(kind: type) -> list[type]:
    """The groups of a command's options: the bases of their class, or the class itself."""
    return [base for base in kind.__bases__ if is_dataclass(base)] or [kind]


def defaults_of(groups: Iterable[type]) -> dict[str, Any]:
    """Defaults of the options of all groups, by name; those that must be given have none."""
    every = {each.name: each.default for group in groups for each in fields(group)}
    return {name: value for name, value in every.items() if value is not MISSING}


def parse_groups(
    groups: Sequence[type],
    command: str,
    description: str | None,
    words: Sequence[str] | None,
    defaults: Mapping[str, Any],
) -> dict[str, Any]:
    """Read a command line into the fields of all groups; an error is a line and status 2.

    The help has ``description``, and a box for each group, headed by its docstring. A command of
    several groups also takes ``--config``, see :func:`config_words`.
    """
    words, prog = sys.argv[1:] if words is None else list(words), program(command)
    with ends_in_one_line():
        _check_repeated(words, groups, command.split()[1:])
    parts: list[Any] = []
    configured: list[str] = []
    if len(groups) > 1:
        with ends_in_one_line():
            configured = config_words(words, command, groups, defaults)
        parts.append(("config", Annotated[Path | None, _CONFIG], None))
    fixed = dict(_FIXED.findall(command))
    copies = [_described(group, defaults, fixed) for group in groups]
    for group in copies:
        title = tyro.conf.arg(name=group.__name__.lower() if len(groups) > 1 else "")
        parts.append((group.__name__, Annotated[group, title]))
    together: Any = make_dataclass("Together", parts, kw_only=True)
    flat = (tyro.conf.OmitArgPrefixes,)
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            parsed: Any = tyro.cli(
                together,
                prog=prog,
                # tyro takes the default of a hidden option, and no words.
                args=[*configured, *words[2 * len(fixed) :]],
                description=description or "",
                config=flat,
            )
    except SystemExit as end:
        if end.code:
            where = f" (with the options of {config_of(words)})" if configured else ""
            problem = _condensed(errors.getvalue())
            print(
                f"error: {problem}{where}{_for_file(problem, groups)}; see {prog} --help",
                file=sys.stderr,
            )
        raise
    boxes = [getattr(parsed, group.__name__) for group in groups]
    return {each.name: getattr(box, each.name) for box in boxes for each in fields(box)}


def _condensed(box: str) -> str:
    """What tyro writes into a box, in a line, without title, help of options and hint at it."""
    plain = re.sub("[│╰╯]", " ", box).splitlines()
    # Options are listed with an indent, and their help with a larger one.
    lines = [" ".join(line.split()) for line in plain if not line.startswith(" " * 10)]
    told = itertools.takewhile(lambda line: "full helptext" not in line, lines)
    inside = [line for line in told if line and "╭" not in line]
    # Where the terminal has no characters for boxes, the title and a line of "-" come first.
    if len(inside) > 2 and set(inside[1]) == {"-"}:
        inside = inside[2:]
    if _OF_ARGUMENT in inside:
        return _unreadable(inside[: inside.index(_OF_ARGUMENT)], *inside)
    text = " ".join(";" if set(line) in ({"─"}, {"-"}) else line for line in inside).replace(
        " ; ", "; "
    )
    text = re.sub(r"(?<=[^:;,|]) (?=--)", ", ", text)
    # The command line leaves an option out instead.
    return re.sub(r"'None', |, 'None'", "", text).strip(" ;.")


def _for_file(problem: str, groups: Iterable[type]) -> str:
    """A hint at the first option that reads a file, where a file stands without an option."""
    word = problem.partition("Unrecognized options: ")[2].partition(";")[0].partition(",")[0]
    if Path(word).suffix.lower() not in _FILES or word.startswith("-"):
        return ""
    for group in groups:
        for name, hint in get_type_hints(group, include_extras=True).items():
            for about in getattr(hint, "__metadata__", ()):
                # "FILE" alone is a file to write.
                if "|FILE" in (getattr(about, "metavar", None) or ""):
                    return f"; pass it as {flag(name)} {word}"
    return ""


def _unreadable(problem: Sequence[str], *lines: str) -> str:
    """An option whose words can't be read: its names, the words, and what it takes."""
    text, usage = " ".join(problem), lines[len(problem) + 1]
    names = text.removeprefix("Error parsing ").partition(":")[0]
    words = re.search(r"\[('.*?')\]|(?:base 10|float): ('.*?')(?: |$)", text)
    given = "" if words is None else (words[1] or words[2]).strip("'").replace("', '", " ")
    return f"{names} {given}: it takes {usage.partition(',')[0].partition(' ')[2]}"


def _described(group: type, defaults: Mapping[str, Any], hidden: Collection[str]) -> type:
    """A group whose options have these defaults, and their docstrings as help without breaks.

    Options that are ``hidden`` are not listed.
    """
    kinds = [kind for kind in reversed(group.__mro__) if is_dataclass(kind)]
    documented = [
        each for kind in kinds for each in docstring_parser.parse_from_object(kind).params
    ]
    texts = {each.arg_name: " ".join((each.description or "").split()) for each in documented}
    hints: Any = get_type_hints(group, include_extras=True)
    described = []
    for each in fields(group):
        about = tyro.conf.arg(help=texts.get(each.name))
        marks = (about, tyro.conf.Suppress) if each.name in hidden else (about,)
        default = (field(default=defaults[each.name]),) if each.name in defaults else ()
        described.append((each.name, Annotated[hints[each.name], *marks], *default))
    copy = make_dataclass(group.__name__, described, kw_only=True)
    copy.__doc__ = group.__doc__
    return copy


def _names(groups: Iterable[type]) -> dict[str, str]:
    """The fields of groups by their flags, those of further names included."""
    hints = [get_type_hints(group, include_extras=True) for group in groups]
    names = {flag(name): name for each in hints for name in each}
    for name, hint in itertools.chain.from_iterable(each.items() for each in hints):
        for about in getattr(hint, "__metadata__", ()):
            names.update(dict.fromkeys(getattr(about, "aliases", None) or (), name))
    return names


def _check_repeated(words: Sequence[str], groups: Iterable[type], fixed: Sequence[str]) -> None:
    """Check that no option is given twice, of which the last would win silently.

    ``fixed`` are words that the command itself puts in front.
    """
    names, before = _names(groups), dict[str, str]()
    for word in [word.partition("=")[0] for word in words if word.startswith("--")]:
        name = word.removeprefix("--").removeprefix("no-")
        option = flag(names.get(flag(name), name))
        if option in before:
            if option in fixed:
                raise ValueError(f"this command sets {option} itself: leave it out")
            same = word == before[option]
            twice = f"{word} is given twice" if same else f"{before[option]} and {word} are one"
            raise ValueError(f"{twice}: pass one of them")
        before[option] = word


def peek(words: Sequence[str], *names: str) -> dict[str, str | None]:
    """The words of some options of a command line, which is not checked."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(*{flag(name), f"--{name}"}, dest=name, nargs="?")
    return vars(parser.parse_known_args(list(words))[0])


def config_of(words: Sequence[str]) -> Path | None:
    """The file of ``--config``."""
    name = peek(words, "config")["config"]
    return None if name is None else Path(name)


def config_words(
    words: Sequence[str], command: str, groups: Iterable[type], defaults: Mapping[str, Any]
) -> list[str]:
    """Turn the file that ``--config`` names into words of the command line.

    The file is JSON or YAML. It holds options by name, or is the ``config.json`` of a run. ``null``
    leaves an option at its default, or at None where the default is another.

    Raises:
        OSError: The file can't be read.
        ValueError: It is not such a file, or it has an option twice or one that the command lacks.
    """
    path = config_of(words)
    options = _read_config(path, command) if path else {}
    for name, value in _FIXED.findall(command):
        other = options.pop(name, value)
        if other != value:
            raise ValueError(f"{path} has --{name} {other}; `iwsft {_benchmark(command)}` takes it")
    out, names, before = list[str](), _names(groups), dict[str, str]()
    for name, value in options.items():
        known = names.get(flag(name), "")
        if known in before:
            raise ValueError(f"{path}: {before[known]!r} and {name!r} are one; leave one out")
        before[known] = name
        if not known:
            near = nearest(name, names.values())
            hint = f"did you mean {near!r}?" if near else "--help lists the options"
            raise ValueError(f"{path}: unknown option {name!r}; {hint}")
        if isinstance(value, bool):
            out.append(flag(known if value else f"no-{known}"))
        elif isinstance(value, list) and not any(isinstance(each, (list, dict)) for each in value):
            out += [flag(known), *map(str, value)]
        elif isinstance(value, (str, int, float)):
            out.append(f"{flag(known)}={value}")
        elif value is not None:
            raise ValueError(f"{path}: {name!r} is {value!r}; it takes a value or a list of values")
        elif defaults.get(known) is not None:
            out.append(f"{flag(known)}=None")
    return out


def _benchmark(command: str) -> str:
    """What the runs of a command are of: d4rl, llm, or loop."""
    return _FIXED.sub("", command).split()[-1]


def _read_config(path: Path, command: str) -> dict[str, Any]:
    """The options that a file holds, by name. One that is there twice is refused."""
    import yaml  # type: ignore[import-untyped]

    text = path.read_text()
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} can't be read as {path.suffix or 'YAML'}: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} holds no options; it reads NAME: VALUE")
    if path.suffix == ".json":
        names = [name for name, _ in json.loads(text, object_pairs_hook=list)]
    else:
        names = [key.value for key, _ in yaml.compose(text).value]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: {twice[0]} is there twice; leave one out")
    if "benchmark" not in content:
        return content
    if content["benchmark"] != _benchmark(command):
        other = content["benchmark"]
        raise ValueError(f"{path} is of a run of {other}; `iwsft {other} --config` takes it")
    if "options" not in content:
        raise ValueError(
            f"{path} holds no options: an earlier release, or another command, wrote it"
        )
    return content["options"]


def to_config(options: Any, without: Collection[str] = ("out", "resume")) -> dict[str, Any]:
    """The options that differ from their defaults, as plain values for :func:`config_words`."""
    content = {}
    for name, default in defaults_of(groups_of(type(options))).items():
        value = getattr(options, name)
        if name not in without and value != default:
            content[name] = list(value) if isinstance(value, tuple) else value
    return content


def flag(name: str) -> str:
    """The flag of an option."""
    return f"--{name.replace('_', '-')}"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that is spelt most like another; None if none is."""
    plain = {each.replace("_", "-"): each for each in names}
    near = difflib.get_close_matches(name.replace("_", "-").lower(), plain, n=1)
    return plain[near[0]] if near else None


def check_at_least(least: int, **numbers: int | None) -> None:
    """Check options that are numbers; None is an option that was left out."""
    for name, number in numbers.items():
        if number is not None and number < least:
            raise ValueError(f"{flag(name)} {number}: at least {least}")


def check_known(kind: str, name: str, known: Sequence[str], place: str | None = None) -> None:
    """Check the name of a ``kind`` of things; the error tells the nearest one that is known.

    It has all that are known, or the ``place`` that lists them.
    """
    if name not in known:
        near = nearest(name, known)
        hint = f"did you mean {near!r}? " if near else ""
        listed = f"it is one of {', '.join(known)}" if place is None else f"{place} lists them"
        raise ValueError(f"unknown {kind} {name!r}; {hint}{listed}")


def check_trackers(names: Sequence[str]) -> None:
    """Check that experiment trackers are known, and that their packages are installed."""
    for name in names:
        check_known("tracker", name, TRACKERS)
        extras.require(name)


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


def check_folder(name: str) -> None:
    """Check that a model is there where its name is a path: no hub id, or in a folder."""
    path = Path(name).expanduser()
    around = path.is_symlink() or (path.parent.is_dir() and "/" in name)
    if not path.exists() and (around or not _HUB_ID.fullmatch(name)):
        raise FileNotFoundError(f"there is no model folder {name}{_neighbour(path)}")


def check_file(name: str) -> None:
    """Check that data or a policy is there where its name ends as that of a file."""
    path = Path(name).expanduser()
    if path.suffix.lower() in _FILES and not path.exists():
        raise FileNotFoundError(f"there is no file {name}{_neighbour(path)}")


def _neighbour(path: Path) -> str:
    """A hint at where a link points, or at what is in the folder under nearly the same name."""
    if path.is_symlink():
        return f": it is a link to {path.readlink()}, which is not there"
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, names)
    return f"; did you mean {path.parent / near}?" if near else ""
