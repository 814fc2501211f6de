"""The commands of the library: ``iwsft NAME`` and ``python -m benchmarks NAME`` are the same."""

from __future__ import annotations

import difflib
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from benchmarks.commands import COMMANDS
from iwsft import __version__
from iwsft.extras import EXTRAS, install

# Distributions whose names are not those of their imports.
_DISTRIBUTIONS = {"markdown_it": "markdown-it-py", "yaml": "pyyaml"}


def main() -> None:
    """Run the command that the command line names; a reader such as head may stop reading."""
    try:
        try:
            _run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError as error:
        # Python would try to write the rest when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from error


def _run() -> None:
    first, rest = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if first in ("-h", "--help"):
        print("\n".join(_help()))
    elif first == "--version":
        print(f"iwsft {__version__}")
    elif first not in COMMANDS:
        near = difflib.get_close_matches(first.lower(), COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        line = f"error: unknown command {first!r}; {hint}it is one of {', '.join(COMMANDS)}"
        print(line, file=sys.stderr)
        raise SystemExit(2)
    else:
        command = COMMANDS[first]
        sys.argv = [f"iwsft {first}", *command.words, *rest]
        # Environments, policies and verifiers of the current folder. It comes last: a file there
        # must not take the place of a package.
        with suppress(FileNotFoundError):
            if (here := os.getcwd()) not in sys.path and "" not in sys.path:
                sys.path.append(here)
        import_module(command.module).run()


def _help() -> Iterator[str]:
    yield "usage: iwsft [-h] [--version] COMMAND ..."
    yield ""
    yield "Importance-weighted supervised fine-tuning for control and language models."
    yield ""
    for command, about in COMMANDS.items():
        yield f"  {command:<9} {about.help}"
    yield ""
    yield "`iwsft COMMAND --help` prints the options of a command."


def run() -> None:
    """Print the versions of the packages and the hardware."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(f"usage: {sys.argv[0]}\n\n{COMMANDS['env'].help}")
        return
    if sys.argv[1:]:
        print(f"error: {sys.argv[0]} takes no options", file=sys.stderr)
        raise SystemExit(2)
    import torch

    from benchmarks.runs import hardware, own_version

    print(f"iwsft {own_version()}")
    print(f"python {platform.python_version()} on {platform.platform()}")
    packages = ["torch", "tensordict", "torchrl", "numpy", "h5py", *EXTRAS]
    for package in packages:
        try:
            print(package, version(_DISTRIBUTIONS.get(package, package)))
        except PackageNotFoundError:
            print(f"{package}: not installed ({install(package)})")
    for device in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        print(", ".join(f"{name} {value}" for name, value in hardware(device).items()))


if __name__ == "__main__":
    main()
