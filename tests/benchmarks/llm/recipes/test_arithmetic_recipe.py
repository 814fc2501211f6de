"""Base model, samples, rows and test of the arithmetic recipe, on a tiny decoder."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from benchmarks.llm.models import RECORD
from benchmarks.llm.recipes import Prepared, Sources
from benchmarks.llm.recipes.arithmetic import BaseSettings
from benchmarks.llm.recipes.arithmetic.base import base_model, config, tokenizer
from benchmarks.llm.recipes.arithmetic.recipe import ArithmeticRecipe
from benchmarks.llm.recipes.arithmetic.samples import (
    TEST_SEED,
    facts,
    sample,
    strategy_probabilities,
    to_rows,
)
from benchmarks.llm.recipes.arithmetic.task import STRATEGIES, parse, problems, split_of
from iwsft.datasets.text.rows import Row
from iwsft.language import correct_only, tokenize

TINY = BaseSettings(
    hidden_size=32, intermediate_size=64, layers=2, heads=2, key_value_heads=1, steps=120, lr=5e-3
)
RECIPE = ArithmeticRecipe(base=TINY, samples=200, held_out=100)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def prepared(cache: Path) -> Prepared:
    return RECIPE.prepare(cache, seed=0)


@pytest.fixture(scope="module")
def decoder(prepared: Prepared) -> Any:
    return AutoModelForCausalLM.from_pretrained(prepared.model).eval()


def test_the_default_base_is_of_the_promised_size() -> None:
    model = Qwen2ForCausalLM(config(BaseSettings()))
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 3_000_000


def test_the_base_learns(prepared: Prepared) -> None:
    losses = json.loads((Path(prepared.model) / RECORD).read_text())["losses"]
    assert losses[-1][0] == TINY.steps
    # It begins near the logarithm of the vocabulary's size.
    assert losses[-1][1] < 0.7 * losses[0][1] < 0.7 * np.log(35)


def test_the_same_seed_trains_the_same_base_and_another_does_not(tmp_path: Path) -> None:
    short = replace(TINY, steps=2)
    torch.manual_seed(1)
    first = base_model(tmp_path / "a", seed=0, settings=short)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    second = base_model(tmp_path / "b", seed=0, settings=short)
    assert torch.equal(torch.rand(1), drawn)
    # The caller's own generator does not depend on it.
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] == weights[1]
    other = base_model(tmp_path / "a", seed=1, settings=short)
    assert other != first and (other / "model.safetensors").read_bytes() != weights[0]


def test_a_cached_base_is_not_trained_again(tmp_path: Path) -> None:
    short = replace(TINY, steps=2)
    home = base_model(tmp_path, seed=0, settings=short)
    written = (home / RECORD).stat().st_mtime_ns
    assert base_model(tmp_path, seed=0, settings=short) == home
    assert (home / RECORD).stat().st_mtime_ns == written


def test_samples_depend_on_their_seed(decoder: Any) -> None:
    asked, tokens = problems(20, 0, "train"), tokenizer()
    first = sample(decoder, tokens, asked, seed=0)
    assert first == sample(decoder, tokens, asked, seed=0)
    assert first != sample(decoder, tokens, asked, seed=1)
    assert [solution.problem for solution in first] == asked


def test_strategies_are_sampled_as_often_as_the_exact_chance_says(decoder: Any) -> None:
    asked, tokens = problems(5, 0, "train"), tokenizer()
    exact = strategy_probabilities(decoder, tokens, asked)
    many = [problem for problem in asked for _ in range(300)]
    found = sample(decoder, tokens, many, seed=0)
    for number in range(len(asked)):
        own = found[300 * number : 300 * (number + 1)]
        counts = Counter(each.verdict.strategy for each in own)
        for strategy, chance in zip(STRATEGIES, exact[number].tolist(), strict=True):
            spread = (chance * (1 - chance) / 300) ** 0.5
            assert abs(counts[strategy] / 300 - chance) < 4.5 * spread + 1e-9


def test_the_greedy_score_is_that_of_transformers_own_generation(
    decoder: Any, prepared: Prepared
) -> None:
    found = RECIPE.evaluate(decoder, tokenizer(), prepared, seed=0)
    tokens, right = tokenizer(), 0
    for problem in problems(RECIPE.held_out, TEST_SEED, "held-out"):
        prompt = tokens(problem.prompt, return_tensors="pt")
        written = decoder.generate(**prompt, max_length=64, do_sample=False)[0].tolist()
        text = tokens.decode(written)
        right += text.endswith(f" Answer: {eval(problem.prompt[:-1])}<eos>")
    assert found["greedy"] == right / RECIPE.held_out


def test_the_test_returns_what_the_protocol_says(decoder: Any, prepared: Prepared) -> None:
    found = RECIPE.evaluate(decoder, tokenizer(), prepared, seed=0)
    low, high = found["interval"]
    assert 0 <= low <= found["score"] <= high <= 1 and found["n"] == RECIPE.held_out
    assert found == RECIPE.evaluate(decoder, tokenizer(), prepared, seed=0)
    assert all(isinstance(v, float | int) for k, v in found.items() if "interval" not in k)


def test_preparing_again_finds_the_same_files(cache: Path, prepared: Prepared) -> None:
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in cache.glob("[!.]*")}

    before = written()
    assert RECIPE.prepare(cache, seed=0) == prepared
    assert written() == before


def test_another_seed_has_other_rows_from_the_same_base(cache: Path, prepared: Prepared) -> None:
    other = RECIPE.prepare(cache, seed=1)
    assert other.model == prepared.model
    assert {row.prompt for row in other.rows}.isdisjoint(row.prompt for row in prepared.rows)


def test_rows_are_training_problems_judged(prepared: Prepared) -> None:
    assert 0 < prepared.notes["right"] < 1
    for row in prepared.rows:
        problem = parse(row.prompt)
        assert split_of(problem) == "train"
        assert row.completion is not None
        right = row.completion.endswith(f" Answer: {eval(row.prompt[:-1])}")
        # A text that reached the limit without its end is wrong whatever it says.
        assert row.correct == right or len(row.completion) > 60
        assert row.score is not None and (row.score >= 0.5) == row.correct


def test_rows_are_ready_for_training(prepared: Prepared) -> None:
    data = tokenize(prepared.rows, tokenizer(), max_length=RECIPE.defaults.max_length)
    good = correct_only(data.trajectories)
    right = sum(bool(row.correct) for row in prepared.rows)
    assert len(good["collector", "traj_ids"].unique()) == right


def test_facts_count_strategies_and_predict() -> None:
    careful = "Step by step: 7+8=15 Answer: "
    texts = [
        f"{careful}15",
        f"{careful}15",
        f"{careful}16",
        "Guess: Answer: 15",
        "Guess: Answer: 9",
    ]
    rows = [
        Row("here", prompt="7+8=", completion=text, score=0.0, correct=text.endswith("15"))
        for text in texts
    ]
    notes = facts(rows)
    assert notes["shares"] == {"careful": 3 / 5, "hasty": 0, "guess": 2 / 5}
    assert notes["success"] == {"careful": 2 / 3, "hasty": 0, "guess": 1 / 2}
    # D+ is two careful texts and a guess.
    predicted = 2 / 3 * 2 / 3 + 1 / 3 * 1 / 2
    assert notes["predicted"] == pytest.approx({"sft": predicted, "best strategy": 2 / 3})


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_own_rows_replace_samples(cache: Path, prepared: Prepared, tmp_path: Path) -> None:
    ours = {"prompt": problems(1, 0, "train")[0].prompt, "completion": "Guess: Answer: 11"}
    asked = {"prompt": problems(1, 0, "held-out")[0].prompt, "completion": "Guess: Answer: 11"}
    path = write(tmp_path / "rows.jsonl", {**ours, "correct": True}, {**asked, "correct": True})
    with pytest.warns(UserWarning, match="1 of 2 rows are on held-out problems"):
        found = RECIPE.prepare(cache, Sources(data=path), seed=0)
    assert [row.prompt for row in found.rows] == [ours["prompt"]]

    only = write(tmp_path / "only.jsonl", {**asked, "correct": True})
    with pytest.raises(ValueError, match="all rows are on held-out problems.*1"):
        RECIPE.prepare(cache, Sources(data=only), seed=0)
    unjudged = write(tmp_path / "unjudged.jsonl", ours)
    with pytest.raises(ValueError, match="unjudged.jsonl:1: .*correct"):
        RECIPE.prepare(cache, Sources(data=unjudged), seed=0)
    other = write(tmp_path / "other.jsonl", {**ours, "prompt": "What is 2+2?", "correct": True})
    with pytest.raises(ValueError, match="other.jsonl:1: 'What is 2"):
        RECIPE.prepare(cache, Sources(data=other), seed=0)


def test_another_model_is_sampled_and_must_know_the_tokens(
    cache: Path, prepared: Prepared, tmp_path: Path
) -> None:
    found = RECIPE.prepare(cache, Sources(model=prepared.model), seed=0)
    assert (found.model, found.rows) == (prepared.model, prepared.rows)
    with pytest.raises(FileNotFoundError, match="no model folder .*nowhere"):
        RECIPE.prepare(cache, Sources(model=str(tmp_path / "nowhere")), seed=0)

    foreign = AutoTokenizer.from_pretrained(prepared.model)
    foreign.add_tokens(["!"])
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=36, **shape, **heads)).save_pretrained(tmp_path / "m")
    foreign.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="tokenizer of .* is not that of the arithmetic recipe"):
        RECIPE.prepare(cache, Sources(model=str(tmp_path / "m")), seed=0)


def test_a_model_with_its_own_code_is_sampled_only_when_trusted(
    cache: Path, prepared: Prepared, tmp_path: Path, bring_code: Callable[[Path], Path]
) -> None:
    model = Path(shutil.copytree(prepared.model, tmp_path / "own"))
    mark = bring_code(model)
    with pytest.raises(ValueError, match="--trust-remote-code"):
        RECIPE.prepare(cache, Sources(model=str(model)), seed=0)
    assert not mark.exists()
    found = RECIPE.prepare(cache, Sources(model=str(model), trust_remote_code=True), seed=0)
    assert mark.exists()
    assert [row.completion for row in found.rows] == [row.completion for row in prepared.rows]


def test_rows_leave_out_empty_completions(decoder: Any) -> None:
    (found,) = sample(decoder, tokenizer(), problems(1, 0, "train"), seed=0)
    assert to_rows([replace(found, completion=""), found])[0].where == "sample 1"
