"""The paper's recipe on a tiny Qwen2 and 20 rows in the columns of s1K-1.1."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.llm.recipes import Sources, load_recipe
from benchmarks.llm.recipes.s1k import AUTHORS, PAPER, S1kRecipe
from iwsft import CausalLMPolicy, ImportanceWeightedMLE
from iwsft.language import EpochSampler, tokenize
from iwsft.trajectory import ASSISTANT_MASK, TOKENS

ROWS = Path(__file__).parents[3] / "datasets" / "text" / "data" / "s1k-1.1-synthetic.jsonl"


def test_settings_are_the_papers():
    # Appendix C: learning rate, betas, weight decay, cosine to zero, warm-up, epochs, batch.
    for defaults in (PAPER, AUTHORS):
        assert (defaults.learning_rate, defaults.adam_beta1, defaults.adam_beta2) == (
            1e-5,
            0.9,
            0.95,
        )
        assert (defaults.weight_decay, defaults.scheduler, defaults.warmup) == (
            1e-4,
            "cosine",
            0.05,
        )
        assert (defaults.epochs, defaults.batch_size, defaults.max_steps) == (5, 8, None)
    recipe = load_recipe("s1k")
    assert recipe.defaults is AUTHORS


def test_both_presets_weigh_as_documented():
    ratio = torch.full((1, 100), 0.3)
    mask = torch.ones(1, 100, dtype=torch.bool)
    from tensordict import TensorDict

    from iwsft.trajectory import Segments

    batch = TensorDict({("masks", "all_assistant_mask"): mask}, batch_size=[1, 100])
    segments = Segments.of(batch, mask=mask)
    multiplicity = torch.ones(100)
    paper = PAPER.importance_weights()(ratio, segments, multiplicity)
    authors = AUTHORS.importance_weights()(ratio, segments, multiplicity)
    assert float(paper[0].reshape(-1)[0]) == pytest.approx(100 * 0.1 * 0.3)
    assert float(authors[0].reshape(-1)[0]) == pytest.approx(0.3)
    # The paper's weights can't hold at the length of its data.
    with pytest.raises(OverflowError, match=r"weight of at least"):
        PAPER.importance_weights().check_overflow(PAPER.max_length or 0)
    AUTHORS.importance_weights().check_overflow(AUTHORS.max_length or 0)


def test_every_row_is_good_whatever_its_grade(tiny_qwen2: Path, tmp_path: Path):
    given = Sources(model=str(tiny_qwen2), data=str(ROWS))
    prepared = S1kRecipe().prepare(tmp_path, given, seed=0)
    assert len(prepared.rows) == 20
    assert all(row.correct is None and row.score is None for row in prepared.rows)
    assert "iwsft evaluate" in prepared.notes["benchmarks"]
    assert prepared == S1kRecipe().prepare(tmp_path, given, seed=3)


@pytest.mark.parametrize("defaults", [PAPER, AUTHORS], ids=["paper", "authors"])
def test_a_step_of_training_on_its_rows(defaults, tiny_qwen2: Path, tmp_path: Path):
    recipe = S1kRecipe(defaults=defaults)
    prepared = recipe.prepare(tmp_path, Sources(model=str(tiny_qwen2), data=str(ROWS)), seed=0)
    model = AutoModelForCausalLM.from_pretrained(prepared.model)
    tokenizer = AutoTokenizer.from_pretrained(prepared.model)
    assert tokenizer.pad_token == prepared.notes["pad_token"] == "<|fim_pad|>"
    before = recipe.evaluate(model, tokenizer, prepared, seed=0)

    data = tokenize(prepared.rows, tokenizer, max_length=defaults.max_length)
    assert not data.truncated
    shown = data.trajectories
    text = tokenizer.decode(shown.get(TOKENS)[shown.get(ASSISTANT_MASK)])
    assert text.count("<|im_start|>think\n") == text.count("<|im_start|>answer\n") == 20
    policy = CausalLMPolicy(model)
    loss = ImportanceWeightedMLE(
        policy,
        importance_weights=defaults.importance_weights(),
        proposal="current",
        length_normalize=defaults.length_normalize,
        functional=False,
    )
    loss.loss_mask_key = ASSISTANT_MASK
    loss.set_keys(action=TOKENS)
    sampler = EpochSampler(shown, defaults.batch_size, pad_token_id=tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for batch in (sampler.sample() for _ in range(5)):
        with torch.no_grad():
            batch.set("ref_log_prob", policy.log_prob(batch))
        out = loss(batch)
        optimizer.zero_grad()
        out["loss_iw_mle"].backward()
        optimizer.step()
        # q = ref: the authors' weights are 1, those of the paper e^(0.02 T).
        assert (out["weight_mean"] > 1.1) == (defaults is PAPER)
    after = recipe.evaluate(model, tokenizer, prepared, seed=0)
    assert after["score"] > before["score"]
    assert after["n"] == 20
    assert after["score"] == pytest.approx(math.exp(after["log_prob"]))
    assert 0 < after["interval"][0] < after["score"] < after["interval"][1] < 1


def test_a_model_without_the_tokens_of_the_recipe(tiny_qwen2: Path, tmp_path: Path):
    folder = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(tiny_qwen2).save_pretrained(folder)
    file = tiny_qwen2 / "tokenizer.json"
    (folder / "tokenizer.json").write_text(file.read_text().replace("fim_pad", "elsewhere"))
    (folder / "tokenizer_config.json").write_text(
        (tiny_qwen2 / "tokenizer_config.json").read_text().replace("fim_pad", "elsewhere")
    )
    with pytest.raises(ValueError, match=r"no <\|fim_pad\|>.* take the tokenizer"):
        S1kRecipe().prepare(tmp_path, Sources(model=str(folder), data=str(ROWS)), seed=0)


def test_data_in_other_columns(tiny_qwen2: Path, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1", "completion": "2"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:1: neither deepseek_thinking_trajectory"):
        S1kRecipe().prepare(tmp_path, Sources(model=str(tiny_qwen2), data=str(file)), seed=0)


def test_a_tokenizer_with_its_own_code_loads_only_when_trusted(
    tiny_qwen2: Path, tmp_path: Path, bring_code: Callable[[Path], Path]
):
    model = Path(shutil.copytree(tiny_qwen2, tmp_path / "own"))
    mark = bring_code(model)
    with (model / "own.py").open("a") as file:
        file.write("from transformers import PreTrainedTokenizerFast\n")
        # transformers marks the class, also for later tests.
        file.write("class Tokens(PreTrainedTokenizerFast): pass\n")
    settings = model / "tokenizer_config.json"
    own = {"tokenizer_class": "Tokens", "auto_map": {"AutoTokenizer": [None, "own.Tokens"]}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | own))
    given = Sources(model=str(model), data=str(ROWS))
    with pytest.raises(ValueError, match="--trust-remote-code"):
        S1kRecipe().prepare(tmp_path, given, seed=0)
    assert not mark.exists()
    S1kRecipe().prepare(tmp_path, replace(given, trust_remote_code=True), seed=0)
    assert mark.exists()
