"""Look for lost runs, other numbers and wrong results in silence, for as long as you like.

python -m scripts.campaigns --seconds 480 --processes 16

python -m scripts.campaigns --only "control killed" --case 17
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from scripts.campaigns import failures, inputs, inputs_text, kills
from scripts.campaigns.engine import KINDS, Campaign, Tally, run

CAMPAIGNS: dict[str, Campaign] = {
    campaign.name: campaign
    for module in (kills, failures, inputs, inputs_text)
    for campaign in module.CAMPAIGNS
}


@dataclass(frozen=True)
class Arguments:
    """Run campaigns, print a table of what they found, and exit with 1 where a result is wrong."""

    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ()
    """Names of the campaigns; by default all."""
    seconds: float = 60.0
    """Seconds for all campaigns together; each gets the same share."""
    processes: int = 2
    """Number of processes."""
    seed: int = 0
    """Seed of all cases."""
    case: int | None = None
    """Number of the one case to run, as a problem is listed."""


def main(arguments: Arguments) -> None:
    """Run the campaigns one after the other."""
    # Children are forked: no thread may run before.
    torch.set_num_threads(1)
    unknown = set(arguments.only) - CAMPAIGNS.keys()
    if unknown:
        raise SystemExit(f"error: no campaign {', '.join(unknown)}; one of {', '.join(CAMPAIGNS)}")
    chosen = [CAMPAIGNS[name] for name in arguments.only or CAMPAIGNS]
    tallies: dict[str, Tally] = {}
    broken: list[str] = []
    for campaign in chosen:
        with tempfile.TemporaryDirectory(prefix="campaign-") as scratch:
            try:
                tallies[campaign.name] = run(
                    campaign,
                    Path(scratch),
                    seconds=arguments.seconds / len(chosen),
                    processes=arguments.processes,
                    seed=arguments.seed,
                    only=arguments.case,
                )
            except RuntimeError as error:
                broken.append(str(error))
                continue
        print(f"{campaign.name}: {tallies[campaign.name].counts['tried']} tried", file=sys.stderr)
    print(table(tallies))
    wrong = sum(t.counts[kind] for t in tallies.values() for kind in KINDS if kind != "obscure")
    if broken:
        raise SystemExit("\n".join(broken))
    if wrong:
        raise SystemExit(1)


def table(tallies: dict[str, Tally]) -> str:
    """Return the counts of each campaign and of all, and below them every problem."""
    width = max(map(len, [*tallies, "all"]))
    columns = ("tried", *KINDS)
    lines = [" " * width + "".join(f"{name:>11}" for name in columns)]
    total = Tally()
    for name, tally in tallies.items():
        total.counts += tally.counts
        lines.append(f"{name:<{width}}" + "".join(f"{tally.counts[c]:>11}" for c in columns))
    lines.append(f"{'all':<{width}}" + "".join(f"{total.counts[c]:>11}" for c in columns))
    for name, tally in tallies.items():
        for number, kind, text in tally.problems:
            lines.append(f"{name}, case {number}: {kind}: {' '.join(text.split())}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
