"""The loop against a plain one in memory; kills, stops, other settings, damaged files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from iwsft.checkpoint import CheckpointError
from iwsft.files import written_whole
from iwsft.loop import NAMES, Round, Stages, fall, run_loop, table

SETTINGS = {"seed": 0, "keep": 2}


class Killed(BaseException):
    """What a kill is to the code that it cuts short."""


def policy_of(path: str) -> int:
    return int(path) if path.isdigit() else int(Path(path).read_text())


def toy(during: Callable[[str, int], None] = lambda name, number: None) -> Stages:
    """A policy is a number; it generates its successors, and the best of three rounds replaces it.

    ``during`` is called within each stage, after half of its work, and may raise.
    """

    def put(one: Round, name: str, content: Any) -> None:
        with written_whole(one.folder / name) as partial:
            partial.write_text(json.dumps(content))

    def get(one: Round, name: str) -> Any:
        return json.loads((one.folder / name).read_text())

    def generate(one: Round) -> dict[str, Any]:
        policy = policy_of(one.policy)
        samples: list[int] = []
        if (one.folder / "samples").exists():
            samples = get(one, "samples")
        for value in range(policy + len(samples), policy + 4):
            samples.append(value)
            put(one, "samples", samples)
            during("generate", one.number)
        return {"samples": len(samples)}

    def score(one: Round) -> dict[str, Any]:
        put(one, "scores", [4 * value % 12 for value in get(one, "samples")])
        during("score", one.number)
        return {"mean": sum(get(one, "scores")) / 4}

    def curate(one: Round) -> dict[str, Any]:
        pairs = list(zip(get(one, "scores"), get(one, "samples"), strict=True))
        put(one, "kept", [pair for pair in pairs if pair[0] > 3])
        during("curate", one.number)
        return {"kept": len(get(one, "kept"))} | ({} if get(one, "kept") else {"stop": "no luck"})

    def fine_tune(one: Round) -> dict[str, Any]:
        pairs = [pair for each in [*one.earlier(2), one] for pair in get(each, "kept")]
        put(one, "policy", max(map(tuple, pairs))[1])
        during("fine_tune", one.number)
        return {"policy": f"round-{one.number}/policy"}

    def evaluate(one: Round) -> dict[str, Any]:
        value = policy_of(one.trained)
        during("evaluate", one.number)
        return {"score": value, "interval": [value - 2, value + 2]}

    return Stages(generate, score, curate, fine_tune, evaluate)


def plain(rounds: int) -> list[int]:
    """The policies of the same loop, in memory."""
    policies, kept = [1], list[list[tuple[int, int]]]()
    for _ in range(rounds):
        values = range(policies[-1], policies[-1] + 4)
        kept.append([(4 * value % 12, value) for value in values if 4 * value % 12 > 3])
        policies.append(max(pair for part in kept[-3:] for pair in part)[1])
    return policies


def run(folder: Path, stages: Stages, rounds: int = 4, **options: Any) -> list[dict[str, Any]]:
    shared: dict[str, Any] = {"settings": SETTINGS, "early_stop": False, "tell": len, "start": "1"}
    return run_loop(folder, stages, rounds=rounds, **{**shared, **options})


def files(folder: Path) -> dict[str, str]:
    """All files of a loop but the lock, without seconds."""
    content = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            value = json.loads(path.read_text())
            if isinstance(value, dict):
                value.pop("seconds", None)
            content[str(path.relative_to(folder))] = value
    return content


def test_it_is_the_plain_loop(tmp_path: Path) -> None:
    rows = run(tmp_path, toy())
    assert [row["score"] for row in rows] == plain(4)
    assert [row["round"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows == table(tmp_path)
    assert all(0 <= row[f"seconds_{name}"] < 60 for row in rows[1:] for name in NAMES)
    # What is finished is not done again, and a larger number of rounds adds some.
    again = run(tmp_path, toy(lambda name, number: pytest.fail(name)), resume=True)
    assert again == rows
    assert [row["score"] for row in run(tmp_path, toy(), 6, resume=True)] == plain(6)


@pytest.mark.parametrize("name", NAMES)
def test_a_kill_in_any_stage_changes_nothing(tmp_path: Path, name: str) -> None:
    run(tmp_path / "whole", toy(), 3)

    def kills() -> Iterator[Callable[[str, int], None]]:
        for number in range(1, 4):

            def during(stage: str, current: int, number: int = number) -> None:
                if (stage, current) == (name, number):
                    raise Killed

            yield during

    for during in kills():
        with pytest.raises(Killed):
            run(tmp_path / "killed", toy(during), 3, resume=True)
    run(tmp_path / "killed", toy(), 3, resume=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_stage_that_finds_nothing_keeps_the_policy(tmp_path: Path) -> None:
    lines: list[str] = []
    stages = toy()

    def curate(one: Round) -> dict[str, Any]:
        return {"kept": 0, "stop": "no luck"} if one.number == 2 else dict(stages.curate(one))

    altered = Stages(stages.generate, stages.score, curate, stages.fine_tune, stages.evaluate)
    options: dict[str, Any] = {"start": "1", "rounds": 3, "settings": {}, "tell": lines.append}
    rows = run_loop(tmp_path, altered, **options)
    assert lines[-1] == "round 2: no luck" and len(rows) == 3
    assert (
        "policy" not in rows[2]
        and Round(2, tmp_path, "1").trained == Round(2, tmp_path, "1").policy
    )
    assert run_loop(tmp_path, altered, resume=True, **options) == rows


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "number", "facts"),
    [
        ("evaluate", 0, lambda value: {"score": value}),
        ("evaluate", 2, lambda value: {"score": 0.5, "interval": [0.4, value]}),
        ("score", 2, lambda value: {"mean": value}),
    ],
)
def test_a_score_that_does_not_compare_is_refused(
    tmp_path: Path, name: str, number: int, facts: Callable[[float], dict[str, Any]], value: float
) -> None:
    """Of such a score no round would be the best, and none would fall."""
    stages, fixed = toy(), list[int]()

    def stage(one: Round) -> dict[str, Any]:
        right = dict(getattr(stages, name)(one))
        return right if fixed or one.number != number else facts(value)

    altered = replace(stages, **{name: stage})
    fact = list(facts(value))[-1]
    message = re.escape(f"round {number}: {name} returned {fact}={facts(value)[fact]};")
    with pytest.raises(ValueError, match=message):
        run(tmp_path, altered, 3)
    # The stage has not ended: once mended, it is called again.
    fixed.append(1)
    assert [row["score"] for row in run(tmp_path, altered, 3, resume=True)] == plain(3)


@pytest.mark.parametrize(
    ("name", "facts", "message"),
    [
        (
            "evaluate",
            {"score": np.float32(0.5)},
            "score=.*, which is not a plain value; return float",
        ),
        ("fine_tune", {"policy": Path("policy")}, "policy=PosixPath.*, which is not a plain value"),
        ("evaluate", {"score": "0.5"}, "score='0.5'; it must be a number"),
        (
            "evaluate",
            {"score": 1, "interval": [2, 0]},
            "interval=.*must be its lower and its upper end",
        ),
        (
            "evaluate",
            {"score": 1, "interval": 2},
            "interval=2.*must be its lower and its upper end",
        ),
        (
            "evaluate",
            {"score": 1, "interval": [0, 1, 2]},
            "interval=.*must be its lower and its upper end",
        ),
    ],
)
def test_facts_that_can_not_be_written_or_compared_name_their_stage(
    tmp_path: Path, name: str, facts: dict[str, Any], message: str
) -> None:
    altered = replace(toy(), **{name: lambda one: facts})
    number = 1 if name == "fine_tune" else 0
    with pytest.raises((TypeError, ValueError), match=f"round {number}: {name} returned {message}"):
        run(tmp_path, altered)
    # The stage has not ended, and the loop is not stuck.
    assert [row["score"] for row in run(tmp_path, toy(), resume=True)] == plain(4)


def test_the_rounds_before_one() -> None:
    def numbers(number: int, most: int) -> list[int]:
        return [one.number for one in Round(number, Path(), "").earlier(most)]

    assert [numbers(5, 2), numbers(2, 3), numbers(5, 0), numbers(1, 3)] == [[3, 4], [1], [], []]


def test_a_score_at_the_end_of_the_interval_is_no_fall() -> None:
    first = {"round": 0, "score": 0.5, "interval": [0.4, 0.6]}
    for last in ({"score": 0.4}, {"score": None}, {}):
        assert fall([first, last]) is None
    for rows in ([{"round": 0, "score": 0.5}, {"score": 0.1}], [{}, {}]):
        assert fall(rows) is None
    assert fall([first, {"score": 0.39}]) is not None


def test_it_ends_early_where_the_score_falls(tmp_path: Path) -> None:
    scores = [0.5, 0.6, 0.58, 0.4, 0.9]

    def evaluate(one: Round) -> dict[str, Any]:
        value = scores[one.number]
        return {"score": value, "interval": [value - 0.05, value + 0.05]}

    plain_stages = toy()
    stages = Stages(
        plain_stages.generate,
        plain_stages.score,
        plain_stages.curate,
        plain_stages.fine_tune,
        evaluate,
    )
    lines: list[str] = []
    rows = run_loop(tmp_path, stages, start="1", rounds=4, settings=SETTINGS, tell=lines.append)
    assert [row["score"] for row in rows] == scores[:4]
    assert "below that of round 1 (0.6" in lines[-1]
    rows = run(tmp_path, stages, resume=True)
    assert [row["score"] for row in rows] == scores


def test_other_versions_and_another_start_are_told(tmp_path: Path) -> None:
    lines: list[str] = []
    for number, (version, start) in enumerate((("1.0", "1"), ("1.0", "1"), ("1.1", "2"))):
        about = {"versions": {"torch": version}}
        settings: dict[str, Any] = {"start": start, "about": about, "tell": lines.append}
        run(tmp_path, toy(), 1, resume=number > 0, **settings)
        for changed in ("torch='1.0' (now '1.1')", "start='1' (now '2')"):
            assert len([line for line in lines if changed in line]) == (number == 2)


def test_other_loops_are_refused(tmp_path: Path) -> None:
    run(tmp_path, toy(), 1)
    with pytest.raises(FileExistsError, match="there already; .* .in Python resume=True"):
        run(tmp_path, toy(), 1)
    with pytest.raises(CheckpointError, match=r"other settings: keep=2 \(now 3\)"):
        run(tmp_path, toy(), 1, resume=True, settings={**SETTINGS, "keep": 3})
    with FileLock(tmp_path / ".lock"), pytest.raises(FileExistsError, match="another process"):
        run(tmp_path, toy(), 1, resume=True)
    (tmp_path / "round-1" / "score.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"score\.json is damaged .*; remove it"):
        run(tmp_path, toy(), 1, resume=True)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not what a loop writes"):
        run(tmp_path, toy(), 1, resume=True)


def test_a_stage_without_facts_is_refused(tmp_path: Path) -> None:
    for name, facts in ("other", {"polcy": "x"}), ("empty", {"policy": None}):
        forgetful = replace(toy(), fine_tune=lambda one, facts=facts: facts)
        with pytest.raises(ValueError, match="fine_tune returned no fact 'policy'"):
            run(tmp_path / name, forgetful, 1)
    # On disk, too.
    run(tmp_path / "ended", toy(), 1)
    (tmp_path / "ended" / "round-1" / "fine_tune.json").write_text('{"facts": {}, "seconds": 1}')
    with pytest.raises(ValueError, match="fine_tune returned no fact 'policy'"):
        run(tmp_path / "ended", toy(), 2, resume=True)
    silent = replace(toy(), score=lambda one: None)
    with pytest.raises(TypeError, match="score returned None; it must return a dict"):
        run(tmp_path / "silent", silent, 1)
    # The stage is called again once it is mended.
    assert len(run(tmp_path / "silent", toy(), 1, resume=True)) == 2
