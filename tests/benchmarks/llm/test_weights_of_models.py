"""`iwsft weights` on language models, against log-probs of each row by itself."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.llm.models import mean_log_probs
from iwsft.language import read

DOCS = Path(__file__).parents[3] / "docs"
FLAGS = "--recipe chat --model its-base --data rows.jsonl --algo sft --max-steps 1 --jobs 1"


@pytest.fixture
def folder(tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with a model, its base, and rows of which one is wrong."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "its-base").symlink_to(tiny_qwen2)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained("my-model")
    AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained("my-model")
    rows = [{"prompt": f"{k}+3=", "completion": f"{k + 3}" * (1 + k % 5)} for k in range(40)]
    rows = [{**row, "score": k % 7, "correct": k != 5} for k, row in enumerate(rows)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def read_numbers(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "weights.json").read_text())
    return content


def test_the_command_of_the_docs_weighs_a_model_by_its_base(
    folder: Path, call: Callable[..., None]
) -> None:
    page = (DOCS / "after_training.md").read_text()
    (words,) = re.findall(r"^    iwsft (weights --model.*)$", page, re.MULTILINE)
    call(*words.split())
    rows = [row for row in read("rows.jsonl") if row.correct]
    log_probs = [
        mean_log_probs(AutoModelForCausalLM.from_pretrained(name), tokenizer, rows)
        for name in ("my-model", "its-base")
        for tokenizer in [AutoTokenizer.from_pretrained(name)]
    ]
    log_ratio = log_probs[0] - log_probs[1]
    found = read_numbers(folder / "runs/weights")
    rho = stats.spearmanr(log_ratio, [row.score for row in rows]).statistic
    assert found["weights"]["weight_score_corr"] == pytest.approx(rho, abs=1e-9)
    for row in found["temperatures"]:
        weight = np.exp(row["k"] * (log_ratio - log_ratio.max()))
        ess = weight.sum() ** 2 / (weight**2).sum() / len(weight)
        assert row["ESS"] == pytest.approx(ess, rel=1e-3)
        assert row["top1"] == pytest.approx(weight.max() / weight.sum(), rel=1e-3)


def test_a_run_is_weighed_by_what_it_saved(
    folder: Path, call: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    call("llm", *FLAGS.split())
    run = Path("runs/llm/chat/sft/seed-0")
    call("weights", str(run), "--data", "rows.jsonl")
    names = ["--model", f"{run}/checkpoint", "--base", "its-base", "--data", "rows.jsonl"]
    call("weights", *names, "--out", "pair")
    ours, pair = read_numbers(run / "weights"), read_numbers(Path("pair"))
    assert {**ours, "name": ""} == {**pair, "name": ""}
    capsys.readouterr()
    # Rows of training, without those that are held out; none is tested twice.
    call("weights", str(run))
    assert read_numbers(run / "weights")["weights"] != ours["weights"]
    # What it trained on is gone once other rows have the name, and so is its base.
    rows, base = Path("rows.jsonl"), Path("its-base")
    content = rows.read_text()
    rows.write_text(content.replace("+3=", "+4="))
    with pytest.raises(SystemExit, match="rows.jsonl has changed since runs/llm/chat/sft/seed-0 "):
        call("weights", str(run))
    rows.write_text(content)
    base.rename("kept")
    base.symlink_to("my-model")
    with pytest.raises(SystemExit, match="its-base has changed since runs/llm/chat/sft/seed-0 "):
        call("weights", str(run))
    base.unlink()
    Path("kept").rename(base)
    other = Path("runs/llm/chat/psft/seed-0")
    shutil.copytree(run, other)
    config = (run / "config.json").read_text().replace('"sft"', '"psft"')
    (other / "config.json").write_text(config)
    for name, message in (
        ("psft", "psft divides by the policy at the last sync, which no file holds"),
        ("base", "base is the reference itself; pass the run of another algorithm"),
    ):
        with pytest.raises(SystemExit, match=message):
            call("weights", f"runs/llm/chat/{name}/seed-0")


WRONG = {
    "--base ./nowhere": "there is no model folder ./nowhere",
    "--data empty.jsonl": "empty",
    "--data untrained.jsonl": "the weight of the tokens is 0 everywhere",
    "--base other": "have tokenizers of other tokens",
    "--data long.jsonl": "a row has 3002 tokens, and its-base reads 2048",
}


def test_rows_that_do_not_fit_are_told_before_a_model_is_loaded(
    folder: Path,
    call: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("empty.jsonl").write_text("")
    Path("untrained.jsonl").write_text('{"prompt": "1+1=", "completion": "2", "weight": 0}\n')
    Path("long.jsonl").write_text(json.dumps({"prompt": "1", "completion": "2" * 3000}) + "\n")
    Path("plain.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n' * 2)
    tokenizer = AutoTokenizer.from_pretrained("its-base")
    tokenizer.add_tokens(["<new>"])
    AutoModelForCausalLM.from_pretrained("its-base").save_pretrained("other")
    tokenizer.save_pretrained("other")
    monkeypatch.setattr("benchmarks.llm.models._load_whole", lambda *_, **__: 1 / 0)
    common = {"--model": "my-model", "--base": "its-base", "--data": "rows.jsonl"}
    for words, message in WRONG.items():
        name, value = words.split()
        with pytest.raises(SystemExit) as end:
            call("weights", *(word for pair in {**common, name: value}.items() for word in pair))
        assert message in str(end.value) and "\n" not in str(end.value), words
    with pytest.raises(ZeroDivisionError):
        call("weights", "--model", "my-model", "--base", "its-base", "--data", "plain.jsonl")
    assert "all trajectories have the same score, or none" in capsys.readouterr().err
