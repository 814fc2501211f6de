"""The loop: generate, score, curate, fine-tune, evaluate, and again with the new policy.

Rejection sampling, expert iteration and their weighted forms are this loop with other stages. It
knows nothing of text or of robots: the five stages are functions. Its state is what is on disk. A
stage that ended has a file ``STAGE.json`` in the folder of its round, and is not done again; one
that a kill cut short is called again, and continues with what it finds in the folder.

    stages = Stages(generate, score, curate, fine_tune, evaluate)
    run_loop(Path("loop"), stages, start="my-model", rounds=4, settings={"seed": 0})
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

from iwsft.checkpoint import CheckpointError, differences
from iwsft.files import alone_in, full_disk_named, write_json

CONFIG = "config.json"
# Facts of a stage that the loop reads; see :class:`Stages`.
POLICY, STOP, SCORE, INTERVAL = "policy", "stop", "score", "interval"

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Round:
    """A round of the loop on disk; round 0 is the start, which is only evaluated.

    Attributes:
        number: Number of the round, from 0.
        root: Folder of the loop.
        start: Name or folder of the policy that the first round generates with.
    """

    number: int
    root: Path
    start: str

    @property
    def folder(self) -> Path:
        """Folder of the round, for all that its stages write."""
        return self.root / f"round-{self.number}"

    @property
    def policy(self) -> str:
        """The policy that the round generates with: the start, or what the last round trained."""
        return self.start if self.number < 2 else self._before(1).trained

    @property
    def trained(self) -> str:
        """The policy at the end of the round, which is its own where it trained none."""
        policy = self.facts("fine_tune").get(POLICY)
        return self.policy if policy is None else str(self.root / policy)

    def earlier(self, most: int) -> list[Round]:
        """Return the last ``most`` rounds before this one, in their order."""
        return [self._before(back) for back in range(min(most, self.number - 1), 0, -1)]

    def facts(self, stage: str) -> dict[str, Any]:
        """Return what a stage that ended returned; empty where it has not ended."""
        path = self.folder / f"{stage}.json"
        if not path.exists():
            return {}
        try:
            facts: dict[str, Any] = json.loads(path.read_text())["facts"]
        except (ValueError, LookupError, TypeError) as error:
            way_out = "remove it and resume, which does the stage again"
            raise CheckpointError(f"{path} is damaged ({error}); {way_out}") from error
        return facts

    def ended(self, stage: str) -> bool:
        """Whether a stage has ended."""
        return (self.folder / f"{stage}.json").exists()

    def _before(self, back: int) -> Round:
        return Round(self.number - back, self.root, self.start)


Stage = Callable[[Round], Facts]


@dataclass(frozen=True)
class Stages:
    """The functions that a round calls, one after the other; each takes the round.

    What a stage computes goes into the folder of the round. It returns facts, plain values for the
    table over rounds, written to ``STAGE.json`` with the seconds that it took. A stage may be
    called again after a kill, and must then end in the same files.

    Attributes:
        generate: Lets the round's ``policy`` act or answer.
        score: Scores what it did.
        curate: Selects what is trained on. A fact ``stop``, a sentence, ends the loop and keeps the
            policy as it is, such as where nothing is good enough.
        fine_tune: Trains, and returns the new policy as the fact ``policy``, a path in the loop's
            folder.
        evaluate: Tests the round's ``trained`` policy, in round 0 the start; returns ``score`` and
            ``interval``, both ends, if anything.
    """

    generate: Stage
    score: Stage
    curate: Stage
    fine_tune: Stage
    evaluate: Stage


NAMES = tuple(each.name for each in fields(Stages))


def run_loop(
    folder: Path,
    stages: Stages,
    *,
    start: str,
    rounds: int,
    settings: Facts,
    resume: bool = False,
    early_stop: bool = True,
    about: Facts | None = None,
    tell: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run the loop for a number of rounds, or what is missing of them.

    Args:
        folder: Folder of the loop; ``round-K`` in it are the rounds.
        stages: What a round does.
        start: Policy that the first round generates with.
        rounds: Number of rounds. With ``resume`` it may be larger than before.
        settings: Plain values that decide the result; a resumed loop must have the same ones.
        resume: Whether to continue the loop that is in the folder.
        early_stop: Whether to end after a round whose score is below the interval of the best one.
        about: Further entries of ``config.json``; a resumed loop tells of other ``versions`` and
            of another ``start``.
        tell: Function that takes a line about each stage.

    Returns:
        The table over rounds, see :func:`table`.

    Raises:
        FileExistsError: A loop is in the folder, or another process works there.
        CheckpointError: The loop in the folder has other settings, or a file of it is damaged.
        TypeError: A stage returned something else than a mapping of plain values, or a score that
            is not a number.
        ValueError: ``fine_tune`` returned no policy, ``score`` or ``evaluate`` a number that is NaN
            or infinite, or ``evaluate`` no interval.
    """
    folder = Path(folder)
    with alone_in(folder, wait=False):
        _claim(folder, settings, resume, {**(about or {}), "start": start}, tell)
        for number in range(rounds + 1):
            one = Round(number, folder, start)
            for name in NAMES if number else NAMES[-1:]:
                _do(one, name, getattr(stages, name), tell)
                if reason := one.facts(name).get(STOP):
                    tell(f"round {number}: {reason}")
                    return table(folder)
            if early_stop and (reason := fall(table(folder)[: number + 1])):
                tell(f"round {number}: {reason}")
                break
    return table(folder)


def table(folder: Path) -> list[dict[str, Any]]:
    """Return a row for each round on disk: its number, all facts of its stages, and seconds.

    ``seconds_STAGE`` are those of the last call of each stage.
    """
    rows: list[dict[str, Any]] = []
    while (Path(folder) / f"round-{len(rows)}").is_dir():
        one = Round(len(rows), Path(folder), "")
        row: dict[str, Any] = {"round": one.number}
        for name in NAMES:
            if one.ended(name):
                row |= one.facts(name)
                content = json.loads((one.folder / f"{name}.json").read_text())
                row[f"seconds_{name}"] = content["seconds"]
        rows.append(row)
    return rows


def best(rows: Sequence[Facts]) -> Facts | None:
    """Return the row with the highest score, of several the first; None where none has a score."""
    scored = [row for row in rows if row.get(SCORE) is not None]
    return max(scored, key=lambda row: row[SCORE]) if scored else None


def fall(rows: list[dict[str, Any]]) -> str | None:
    """Return why the loop ends: its last score is below the interval of the best; None if not."""
    top, last = best(rows), rows[-1]
    if top is None or last.get(SCORE) is None or top.get(INTERVAL) is None:
        return None
    low, high = top[INTERVAL]
    if last[SCORE] >= low:
        return None
    return (
        f"the score fell to {last[SCORE]:.3g}, below that of round {top['round']} "
        f"({top[SCORE]:.3g}, 95 % interval {low:.3g} to {high:.3g}): the loop ends; round "
        f"{top['round']} is the best"
    )


def _do(one: Round, name: str, stage: Stage, tell: Callable[[str], None]) -> None:
    """Call a stage that has not ended, and write down what it returns."""
    if one.ended(name):
        _check_policy(name, one.facts(name))
        return
    with full_disk_named(one.folder):
        one.folder.mkdir(parents=True, exist_ok=True)
    tell(f"round {one.number}: {name.replace('_', '-')}")
    begin = time.perf_counter()
    facts = stage(one)
    if not isinstance(facts, Mapping):
        raise TypeError(f"{name} returned {facts!r:.60}; it must return a dict of facts")
    _check_policy(name, facts)
    _check_facts(one, name, facts)
    content = {"facts": dict(facts), "seconds": round(time.perf_counter() - begin, 3)}
    write_json(one.folder / f"{name}.json", content)


def _check_policy(name: str, facts: Facts) -> None:
    """Check that a fine-tuning names its policy, or ends the loop."""
    if name == "fine_tune" and facts.get(POLICY) is None and STOP not in facts:
        raise ValueError(f"fine_tune returned no fact {POLICY!r}, the path of the new policy")


def _check_facts(one: Round, name: str, facts: Facts) -> None:
    """Check that facts can be written, and that those of scores and tests can be compared."""
    for fact, value in facts.items():
        told = f"round {one.number}: {name} returned {fact}={value!r:.60}"
        try:
            json.dumps(value)
        except TypeError as error:
            raise TypeError(
                f"{told}, which is not a plain value; return float(...) or str(...)"
            ) from error
        numbers = value if isinstance(value, list | tuple) else [value]
        compared = name in ("score", "evaluate")
        if compared and not all(math.isfinite(x) for x in numbers if isinstance(x, float)):
            raise ValueError(f"{told}; mend what computes it, or leave the fact out")
        if name != "evaluate" or value is None:
            continue
        if fact == SCORE and not isinstance(value, Real):
            raise TypeError(f"{told}; it must be a number")
        if fact == INTERVAL and not (len(numbers) == 2 and numbers[0] <= numbers[1]):
            raise ValueError(f"{told}; it must be its lower and its upper end")


def check_free(folder: Path) -> None:
    """Check that no loop is in a folder."""
    if (folder / CONFIG).exists():
        way_out = "pass --resume (in Python resume=True) to continue it, or another folder (--out)"
        raise FileExistsError(f"{folder}: a loop is there already; {way_out}")


def _claim(
    folder: Path, settings: Facts, resume: bool, about: Facts, tell: Callable[[str], None]
) -> None:
    """Write ``config.json``, or check that the loop there is this one."""
    path = folder / CONFIG
    if not resume:
        check_free(folder)
    if not path.exists():
        write_json(path, {**about, "settings": settings})
        return
    try:
        config = json.loads(path.read_text())
        differ = differences(config["settings"], settings)
        began = {"start": config.get("start", about["start"]), **config.get("versions", {})}
        changed = differences(began, {"start": about["start"], **about.get("versions", {})})
    except (ValueError, LookupError, TypeError) as error:
        way_out = "move the folder away, or choose another one (--out)"
        raise CheckpointError(f"{path} is not what a loop writes ({error}); {way_out}") from error
    if differ:
        way_out = "run with those, or choose another folder (--out)"
        raise CheckpointError(f"{folder} holds a loop with other settings: {differ}; {way_out}")
    if changed:
        other = "another start or other versions"
        tell(f"{folder} was begun with {other}, so rounds may differ: {changed}")
