"""The language loop and its verifiers: none right, a verifier that changes, no verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_loop import VERIFIERS, lines, score


def test_a_loop_without_a_right_answer_keeps_the_model(
    run: Callable[..., list[dict[str, Any]]],
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = run(verifier="integer")
    assert "no prompt has a right answer" in rows[1]["stop"]
    assert rows[1]["left_out"] == {"all-wrong prompts": 8, "answers to all-wrong prompts": 48}
    said = capsys.readouterr()
    samples = lines(tmp_path / "loop" / "round-1" / "generations.jsonl")
    cut = sum(not each["stopped"] for each in samples)
    # Of random texts most have none.
    verdicts = lines(tmp_path / "loop" / "round-1" / "scores.jsonl")
    unread = sum(each["answer"] is None for each in verdicts)
    assert f"{unread} of 48 answers have no final answer (\\boxed{{...}}, " in said.err
    assert f"0 of 48 answers kept ({cut} reached --max-tokens" in said.err
    assert "so the model stays as it is" in said.err and str(place / "model") in said.out


def test_a_verifier_that_is_mended_or_changed_between_two_calls(
    run: Callable[..., list[dict[str, Any]]],
    place: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    module, first = place / "scripted_verifiers.py", tmp_path / "loop" / "round-1"

    def run_with(body: str, *flags: str) -> list[dict[str, Any]]:
        module.write_text(VERIFIERS.replace('raise KeyError("no such column")', body))
        return run("--resume", "--min-score", "0.5", "--epochs", "1", *flags, verifier="broken")

    try:
        with pytest.raises(SystemExit, match="verifier failed on .* KeyError: 'no such column'"):
            run("--min-score", "0.5", verifier="broken")
        samples = (first / "generations.jsonl").read_bytes()
        row = run_with("return 0")[1]
        assert row["verifier_failed"] == 0
        # A kill leaves a part of the scores: all are of the code of now.
        scores = first / "scores.jsonl"
        scores.write_text("".join(scores.read_text().splitlines(keepends=True)[:5]))
        (first / "score.json").unlink()
        (first / "curate.json").unlink()
        assert run_with("return 0.5")[1]["verifier_code"] != row["verifier_code"]
        assert {each["score"] for each in lines(scores)} == {0.5, None}
        assert "other code" not in capfd.readouterr().err
        run_with("return 0.6", "--rounds", "2")
        assert "round 2: other code scored the round before" in capfd.readouterr().err
    finally:
        module.write_text(VERIFIERS)
    assert (first / "generations.jsonl").read_bytes() == samples


def test_an_answer_without_a_verdict_is_never_right(
    run: Callable[..., list[dict[str, Any]]], place: Path, tmp_path: Path
) -> None:
    """Neither one that has no end nor one on which the verifier fails, whatever the scores are."""
    held_out = str(place / "held-out.jsonl")
    flags = ("--min-score", "-1", "--eval-prompts", held_out, "--eval-samples", "4")
    row = run(*flags, verifier="debt")[1]
    prompts = [each["prompt"] for each in lines(place / "prompts.jsonl")]
    samples = lines(tmp_path / "loop" / "round-1" / "generations.jsonl")
    right = {
        (each["id"], each["sample"])
        for each in samples
        if each["stopped"]
        and len(each["text"]) % 5
        and score(each["text"], prompts[int(each["id"])])
    }
    assert any(not each["stopped"] for each in samples) and row["verifier_failed"] > 0
    assert row["pass_rate"] == pytest.approx(len(right) / len(samples))
    texts = {each["text"] for each in samples if (each["id"], each["sample"]) in right}
    trained = lines(tmp_path / "loop" / "round-1" / "rows.jsonl")
    assert {each["messages"][1]["content"] for each in trained} <= texts
    tests = lines(tmp_path / "loop" / "round-1" / "evaluation" / "generations.jsonl")
    asked = [each["prompt"] for each in lines(place / "held-out.jsonl")]
    passed = [
        each["stopped"] and len(each["text"]) % 5 and score(each["text"], asked[int(each["id"])])
        for each in tests
    ]
    assert row["score"] == pytest.approx(sum(map(bool, passed)) / len(tests))
