"""A model and rows of the hub, from a cache without a network: their commits are recorded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset

from benchmarks.llm.__main__ import main
from benchmarks.llm.generators import load_prompter

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


def store(home: Path, tiny_qwen2: Path, model: str, data: str) -> None:
    """Put a model and a dataset, each of a commit, where the hub's libraries keep the newest."""
    repo = home / "hub" / "models--an-owner--tiny"
    shutil.copytree(tiny_qwen2, repo / "snapshots" / model, dirs_exist_ok=True)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(model)
    place = home / "datasets" / "an-owner___sums" / "default" / "0.0.0" / data
    if not place.exists():
        file, cache = home / f"{data}.jsonl", home / f"of-{data}"
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


def test_commits_are_in_config_and_card_and_a_resumed_run_has_the_same(
    home: Path, tiny_qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store(home, tiny_qwen2, ONE, ONE)
    words = [*WORDS, "--out", str(tmp_path / "runs")]
    main(words)
    run = tmp_path / "runs" / "llm" / "chat" / "sft" / "seed-0"
    settings = json.loads((run / "config.json").read_text())["settings"]
    assert (settings["model_commit"], settings["data_commit"]) == (ONE, ONE)
    # As the evaluation and the loop record it.
    assert load_prompter("an-owner/tiny").identity == ONE
    card = (run / "checkpoint" / "README.md").read_text()
    for name in ("tiny", "sums"):
        assert f"`an-owner/{name}` at commit {ONE}" in card
    for model, data, changed in ((OTHER, ONE, "model"), (ONE, OTHER, "data")):
        store(home, tiny_qwen2, model, data)
        with pytest.raises(SystemExit, match=rf"settings\.{changed}_commit='a.*\(now 'b"):
            main([*words, "--resume"])
    store(home, tiny_qwen2, ONE, ONE)
    main([*words, "--resume"])
    # Finished runs are shown without hub and cache; others need them.
    shutil.rmtree(home)
    capsys.readouterr()
    main([*words, "--resume"])
    told = capsys.readouterr()
    assert "0 done, 2 finished before" in told.out
    for name in ("tiny", "sums"):
        assert f"whether an-owner/{name} has changed is not known" in told.err
    (run / "result.json").unlink()
    with pytest.raises(SystemExit, match="an-owner/"):
        main([*words, "--resume"])
