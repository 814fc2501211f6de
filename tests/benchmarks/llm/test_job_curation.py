"""What the job trains on: right rows, their counts and scores, and the rows that judge."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_job
import torch
from scipy import stats
from tensordict import NestedKey
from torch.nn.functional import log_softmax

from benchmarks.llm.__main__ import main
from benchmarks.llm.curation import curated
from benchmarks.llm.models import load
from benchmarks.llm.options import ALGORITHMS
from benchmarks.llm.recipes import Sources
from benchmarks.llm.settings import Settings
from iwsft.datasets.text.rows import Row
from iwsft.trajectory import DATA_WEIGHT, MULTIPLICITY, STANDARD_SCORE, SUCCESS_RATE, lengths
from tests.datasets.text.chat_tokenizers import byte_level


def test_rows_that_count_0_times_judge_nothing() -> None:
    texts = {True: "yes", False: "no"}
    rows = [
        Row(f"{k}", prompt=f"{k}?", completion=texts[right], correct=right, count=k % 3)
        for k in range(30)
        for right in (True, False)
    ]
    apart = {row.where for row in rows if small_job.digest(row.prompt) % 5 == 0 and row.count}
    settings = Settings(learning_rate=1e-3, batch_size=4, max_steps=1, q="auto")
    data = curated(rows, byte_level(), ALGORITHMS["iw-sft-hard"], settings, seed=0)
    counts = data.get(MULTIPLICITY)[lengths(data).cumsum(0) - 1]
    assert int((counts == 0).sum()) == 2 * len(apart) > 0
    assert int(counts.sum()) == sum(k % 3 for k in range(30) if f"{k}" not in apart)


def test_a_warning_of_equal_scores_names_no_option_that_the_command_lacks() -> None:
    rows = [
        Row(f"{k}", prompt=f"{k}?", completion="yes", score=float(k == 0), correct=True)
        for k in range(8)
    ]
    settings = Settings(learning_rate=1e-3, batch_size=4, max_steps=1, cuts=(50,))
    with pytest.warns(UserWarning) as caught:
        data = curated(rows, byte_level(), ALGORITHMS["iw-sft"], settings, seed=0)
    assert len(lengths(data)) == 4
    assert [str(each.message) for each in caught] == [
        "cut 50 falls among 7 equal scores (0): 3 of the 4 trajectories kept are drawn by chance "
        "from them"
    ]


def test_training_and_test_are_cut_at_one_length(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Also the test of the base, which then is not that of runs of another length."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{k}?", "completion": f"{k} and so on and on"} for k in range(10, 20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[5:]))
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))

    def run(*flags: str) -> None:
        words = ["--recipe", "chat", "--model", str(tiny_qwen2), "--data", str(file), "--jobs", "1"]
        words += ["--eval-data", str(held_out), "--out", str(tmp_path / "runs"), *flags]
        main([*words, "--max-steps", "1"] if "sft" in flags else words)

    run("--algo", "base", "--max-length", "9")
    result = json.loads(next((tmp_path / "runs").rglob("base/seed-0/result.json")).read_text())
    model, tokenizer = load(str(tiny_qwen2))
    means = []
    for row in rows[:5]:
        prompt, answer = (tokenizer.encode(row[name]) for name in ("prompt", "completion"))
        ids = [*prompt, *answer][:9]
        with torch.no_grad():
            log_prob = log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        places = range(len(prompt), 9)
        means.append(np.mean([float(log_prob[t - 1, ids[t]]) for t in places]))
    assert result["log_prob"] == pytest.approx(np.mean(means), abs=1e-5)
    assert result["score_name"].endswith(", max_length 9")
    with pytest.raises(SystemExit, match=r"base/seed-0 holds .*: settings.max_length=9 \(now None"):
        run("--algo", "sft")
    run("--algo", "sft", "--max-length", "9")


def test_d_plus_and_its_multiplicity(small: tuple[str, str], tmp_path: Path) -> None:
    """Right rows alone; with quality cuts each cut that a row survives is one copy of it."""
    _, tokenizer = load(small[0])
    prepared = small_job.RECIPE.prepare(tmp_path, Sources(*small), seed=0)
    right = [row for row in prepared.rows if row.correct]
    settings = Settings(learning_rate=1e-3, batch_size=4, max_steps=1, quality_cuts=(0, 50))

    def column(key: NestedKey, algo: str, **changed: Any) -> list[float]:
        rows = replace(prepared, **changed).rows
        data = curated(rows, tokenizer, ALGORITHMS[algo], settings, seed=0)
        return data.get(key)[lengths(data).cumsum(0) - 1].tolist()

    counts = partial(column, MULTIPLICITY)

    # weight_score_corr of the log is that with the score, not with the length.
    scores = np.array([row.score for row in prepared.rows])
    assert column(STANDARD_SCORE, "topr") == pytest.approx((scores - scores.mean()) / scores.std())
    unscored = [replace(row, score=None) for row in prepared.rows]
    assert not any(column(STANDARD_SCORE, "nft", rows=unscored))
    assert counts("sft") == [1] * len(right)
    # Wrong rows count where their sign does.
    assert counts("topr") == [1] * len(prepared.rows)
    rate, first = len(right) / len(prepared.rows), prepared.rows[0].correct
    for algo, weights in (("nft", (1, -1)), ("asymre", (1.1 - rate, 0.1 - rate))):
        data = curated(prepared.rows, tokenizer, ALGORITHMS[algo], settings, seed=0)
        trained = data.get(DATA_WEIGHT)[data.get(DATA_WEIGHT) != 0]
        assert sorted(trained.unique().tolist()) == pytest.approx(sorted(weights))
        assert float(trained[0]) == pytest.approx(weights[0] if first else weights[1])
        asked = [row.prompt for row in prepared.rows]
        once = torch.tensor([asked.count(prompt) == 1 for prompt in asked])
        rates = data.get(SUCCESS_RATE)[lengths(data).cumsum(0) - 1]
        torch.testing.assert_close(rates[once], torch.full_like(rates[once], rate))
    settings = replace(settings, baseline_margin=rate)
    with pytest.raises(ValueError, match="must be below the share of right rows"):
        curated(prepared.rows, tokenizer, ALGORITHMS["asymre"], settings, seed=0)
    weight = np.exp([row.score / settings.rwr_beta for row in right])
    assert column(DATA_WEIGHT, "rwr") == pytest.approx(weight / weight.mean())
    # Rows that choose the exponent count once each, and are not trained on.
    settings = replace(settings, q="auto")
    counted = counts("iw-sft-hard", rows=[replace(row, count=2) for row in prepared.rows])
    assert {*counted} == {0, 2}
    settings = replace(settings, q=None)
    found = counts("sft-q")
    assert len(found) == len(right) and sum(n == 2 for n in found) == -(-len(right) // 2)
    best = sorted((row.score for row in right), reverse=True)[: len(right) // 2]
    twice = [row.score for row, n in zip(right, found, strict=True) if n == 2]
    assert min(twice) >= min(best)
    counted = [Row("a", prompt="1+1=", completion="2", count=n, score=n / 2) for n in (3, 0, 3)]
    assert counts("sft-q", rows=counted) == counts("sft", rows=counted) == [3, 3]
    # Their scores, which cut nothing, are still those that weights correlate with.
    expected = stats.zscore([row.score for row in counted])[[0, 2]]
    assert column(STANDARD_SCORE, "sft", rows=counted) == pytest.approx(expected)
    # A row that counts 0 times takes no weight from the others, whatever its score is.
    scored = [replace(row, score=score) for row, score in zip(counted, (1, 900, 2), strict=True)]
    weight = np.exp([1 / settings.rwr_beta, 2 / settings.rwr_beta])
    assert column(DATA_WEIGHT, "rwr", rows=scored) == pytest.approx(weight / weight.mean())
    # Without scores there are none, not even the lengths.
    bare = [Row("a", prompt="1+1=", completion="2" * n, count=1) for n in (1, 2)]
    assert column(STANDARD_SCORE, "sft", rows=bare) == [0, 0]
