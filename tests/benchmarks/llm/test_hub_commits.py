"""A model and rows of the hub, from a cache without a network: one commit from start to end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_evaluation
import torch
from datasets import Dataset, load_dataset
from small_loop import lines
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from benchmarks.llm import generators, job
from benchmarks.llm.__main__ import main
from benchmarks.llm.evaluation.run import run as evaluate
from benchmarks.llm.models import load

ONE, OTHER = "a" * 40, "b" * 40
WORDS = (
    *("--recipe", "chat", "--model", "an-owner/tiny", "--data", "an-owner/sums"),
    *("--algo", "sft", "--max-steps", "1", "--warmup", "0", "--jobs", "1"),
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the hub's libraries, empty. They work offline."""
    home = tmp_path / "home"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home / "datasets")
    for library in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)
    return home


def move(home: Path, folder: Path, commit: str) -> None:
    """Make a commit, with the model of a folder, the newest that the hub has of ``an-owner/tiny``.

    At ``OTHER`` the weights are those of the folder times 1.5.
    """
    repo = home / "hub" / "models--an-owner--tiny"
    place = repo / "snapshots" / commit
    if not place.exists():
        shutil.copytree(folder, place)
        if commit == OTHER:
            model = AutoModelForCausalLM.from_pretrained(folder)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.5)
            model.save_pretrained(place)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(commit)


def move_data(home: Path, commit: str) -> None:
    """Put a commit of the dataset ``an-owner/sums`` where datasets looks for the newest copy."""
    place = home / "datasets" / "an-owner___sums" / "default" / "0.0.0" / commit
    if not place.exists():
        file, cache = home / f"{commit}.jsonl", home / f"of-{commit}"
        rows = [{"prompt": f"{k}+3=", "completion": f"{k + 3}"} for k in range(20)]
        Dataset.from_list(rows).to_json(file)
        load_dataset("json", data_files=str(file), cache_dir=str(cache))
        (written,) = cache.glob("json/*/0.0.0/*/dataset_info.json")
        shutil.copytree(written.parent, place)
        (place / "json-train.arrow").rename(place / "sums-train.arrow")
        info = json.loads(written.read_text())
        info |= {"config_name": "default", "dataset_name": "sums"}
        (place / "dataset_info.json").write_text(json.dumps(info))
    os.utime(place)


def read(runs: Path, algo: str, name: str, seed: int = 0) -> dict[str, Any]:
    folder = runs / "llm" / "chat" / algo / f"seed-{seed}"
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def weights(runs: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    folder = runs / "llm" / "chat" / "sft" / f"seed-{seed}" / "checkpoint"
    return Qwen2ForCausalLM.from_pretrained(folder).state_dict()


@pytest.fixture
def sums(home: Path, tiny_qwen2: Path) -> Path:
    """The cache with the first commit of model and dataset."""
    move(home, tiny_qwen2, ONE)
    move_data(home, ONE)
    return home


def test_commits_are_in_config_and_card_and_finished_runs_need_no_hub(
    sums: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "--out", str(tmp_path / "runs")]
    main(words)
    settings = read(tmp_path / "runs", "sft", "config.json")["settings"]
    assert (settings["model_commit"], settings["data_commit"]) == (ONE, ONE)
    # As the evaluation and the loop record it.
    assert generators.load_prompter("an-owner/tiny").identity == ONE
    run = tmp_path / "runs" / "llm" / "chat" / "sft" / "seed-0"
    card = (run / "checkpoint" / "README.md").read_text()
    for name in ("tiny", "sums"):
        assert f"`an-owner/{name}` at commit {ONE}" in card
    shutil.rmtree(sums)
    capsys.readouterr()
    main([*words, "--resume"])
    assert "0 done, 2 finished before" in capsys.readouterr().out
    (run / "result.json").unlink()
    with pytest.raises(SystemExit, match="an-owner/"):
        main([*words, "--resume"])


def test_runs_stay_at_their_commit_where_the_hub_moves(
    sums: Path, tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still, moved, newer = (tmp_path / name for name in ("still", "moved", "newer"))
    main([*WORDS, "--out", str(still)])
    # The hub moves after the claim, between the runs of a sweep.
    train_and_score = job.train_and_score

    def moving(run: Any) -> None:
        move(sums, tiny_qwen2, OTHER)
        train_and_score(run)

    with monkeypatch.context() as patch:
        patch.setattr(job, "train_and_score", moving)
        main([*WORDS, "--out", str(moved)])
    assert (sums / "hub/models--an-owner--tiny/refs/main").read_text() == OTHER
    # What was interrupted continues, and further seeds are of the same commit.
    (moved / "llm/chat/sft/seed-0/result.json").unlink()
    main([*WORDS, "--out", str(moved), "--resume", "--seeds", "0", "1"])
    main([*WORDS, "--out", str(newer), "--seeds", "0", "1"])
    log_probs = [read(runs, "base", "result.json")["log_probs"] for runs in (still, moved, newer)]
    assert log_probs[0] == log_probs[1] != log_probs[2]
    log_probs = [read(runs, "sft", "result.json")["log_probs"] for runs in (still, moved, newer)]
    assert log_probs[0] == log_probs[1] != log_probs[2]
    first, again, other = (weights(runs) for runs in (still, moved, newer))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not any(torch.equal(value, other[name]) for name, value in first.items())
    commits = [
        read(runs, "sft", "config.json", seed)["settings"]["model_commit"]
        for runs, seed in ((moved, 1), (newer, 1))
    ]
    assert commits == [ONE, OTHER]
    # A commit can be named, so that others repeat the run.
    named = [word.replace("tiny", f"tiny@{ONE}") for word in WORDS]
    main([*named, "--out", str(tmp_path / "named")])
    assert all(
        torch.equal(value, weights(tmp_path / "named")[name]) for name, value in first.items()
    )


def test_a_newer_copy_of_a_dataset_is_not_taken_for_the_recorded_one(
    sums: Path, tmp_path: Path
) -> None:
    words = [*WORDS, "--out", str(tmp_path / "runs")]
    main(words)
    move_data(sums, OTHER)
    # Finished runs read no rows.
    main([*words, "--resume"])
    (tmp_path / "runs/llm/chat/sft/seed-0/result.json").unlink()
    with pytest.raises(SystemExit, match=f"newest copy here is of commit {OTHER}, not {ONE}; run"):
        main([*words, "--resume"])
    move_data(sums, ONE)
    main([*words, "--resume"])


def test_adapters_stay_on_the_commit_that_they_were_trained_on(
    sums: Path, tiny_qwen2: Path, tmp_path: Path
) -> None:
    main([*WORDS, "--lora-rank", "2", "--out", str(tmp_path / "runs")])
    folder = tmp_path / "runs/llm/chat/sft/seed-0/checkpoint"
    move(sums, tiny_qwen2, OTHER)
    loaded = load(str(folder))[0].state_dict()
    base = Qwen2ForCausalLM.from_pretrained(tiny_qwen2).state_dict()
    own = {name.replace(".base_layer", ""): value for name, value in loaded.items()}
    assert all(torch.equal(own[name], value) for name, value in base.items())


def test_an_evaluation_continues_at_its_commit(
    home: Path, data: Path, model: Path, tmp_path: Path
) -> None:
    def scored(out: str, **others: Any) -> list[dict[str, Any]]:
        given = small_evaluation.settings(Path("an-owner/tiny"), data, tmp_path / out, **others)
        evaluate(given)
        return lines(tmp_path / out / "tiny" / "gsm8k" / "generations.jsonl")

    move(home, model, ONE)
    answers = scored("first")
    move(home, model, OTHER)
    assert scored("other") != answers
    written = tmp_path / "first/tiny/gsm8k/generations.jsonl"
    written.write_text("".join(written.read_text().splitlines(keepends=True)[:3]))
    assert scored("first", resume=True) == answers


def test_a_loop_continues_at_its_commit(
    home: Path, place: Path, run: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    move(home, place / "model", ONE)
    flags = ("--model", "an-owner/tiny", "--start-from", "base")
    rows = run(*flags, "--rounds", "2", out="still")
    run(*flags, "--rounds", "1", out="moved")
    move(home, place / "model", OTHER)
    again = run(*flags, "--rounds", "2", "--resume", out="moved")
    assert [row["pass_rate"] for row in again[1:]] == [row["pass_rate"] for row in rows[1:]]
    saved = "round-2/training/llm/round/iw-sft/seed-0/checkpoint/model.safetensors"
    first, second = tmp_path / "still" / saved, tmp_path / "moved" / saved
    assert first.read_bytes() == second.read_bytes()
    card = first.with_name("README.md").read_text()
    assert "base_model: an-owner/tiny\n" in card and f"`an-owner/tiny` at commit {ONE}" in card
