"""Generation through transformers against plain forward passes, and samples against their law."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from iwsft.language.generation import (
    Completion,
    Request,
    TransformersGenerator,
    VLLMGenerator,
    draw,
)

VOCABULARY = 61
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [30, 31]]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        # Wide enough that greedy tokens differ from step to step.
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def plain(model: LlamaForCausalLM, request: Request, stop: frozenset[int]) -> Completion:
    """One forward pass of the whole sequence a token: no cache, no padding, no `generate`."""
    tokens = list(request.prompt)
    for step in range(request.max_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1]
        if step < request.min_tokens:
            logits[list(stop)] = -torch.inf
        token = int(logits.argmax())
        if token in stop:
            return Completion(tuple(tokens[len(request.prompt) :]), token)
        tokens.append(token)
    return Completion(tuple(tokens[len(request.prompt) :]), None)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_greedy_is_the_argmax_of_plain_forward_passes(
    model: LlamaForCausalLM, batch_size: int
) -> None:
    requests = [Request(prompt, 6 + 5 * row) for row, prompt in enumerate(PROMPTS)]
    free = [plain(model, request, frozenset()) for request in requests]
    assert len({completion.tokens for completion in free}) == 4
    # A token that appears inside, so that some rows stop early and others do not.
    stop = frozenset({free[3].tokens[4], free[1].tokens[0]})
    expected = [plain(model, request, stop) for request in requests]
    assert {completion.stop is None for completion in expected} == {True, False}

    generator = TransformersGenerator(model, batch_size=batch_size)
    assert generator.generate(requests, stop=frozenset()) == free
    assert generator.generate(requests, stop=stop) == expected


def test_no_stop_token_among_the_first(model: LlamaForCausalLM) -> None:
    first = plain(model, Request(PROMPTS[0], 1), frozenset()).tokens[0]
    stop = frozenset({first})
    requests = [Request(PROMPTS[0], 5, min_tokens=least) for least in (0, 1, 3)]
    found = TransformersGenerator(model).generate(requests, stop=stop)
    assert found == [plain(model, request, stop) for request in requests]
    assert found[0] == Completion((), first)
    assert len(found[1].tokens) >= 1 and len(found[2].tokens) >= 3


def test_own_settings_of_the_model_are_not_used_and_stay(model: LlamaForCausalLM) -> None:
    requests = [Request(prompt, 12) for prompt in PROMPTS]
    expected = [plain(model, request, frozenset()) for request in requests]
    own = model.generation_config
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.eos_token_id = expected[0].tokens[0]
    model.train()
    try:
        found = TransformersGenerator(model).generate(requests, stop=frozenset())
        assert found == expected
        assert model.training and model.generation_config is own
        assert own.repetition_penalty == 50.0
    finally:
        own.repetition_penalty, own.eos_token_id = None, None
        model.eval()


def test_samples_depend_on_the_seed_alone(model: LlamaForCausalLM) -> None:
    requests = [Request(prompt, 20, seed=seed) for seed, prompt in enumerate(PROMPTS * 2)]
    settings: dict[str, Any] = {"stop": frozenset({3}), "temperature": 1.5, "top_p": 0.9}
    whole = TransformersGenerator(model, batch_size=8).generate(requests, **settings)
    alone = TransformersGenerator(model, batch_size=1).generate(requests, **settings)
    turned = TransformersGenerator(model, batch_size=3).generate(requests[::-1], **settings)
    torch.manual_seed(123)
    again = TransformersGenerator(model, batch_size=8).generate(requests, **settings)
    assert whole == alone == turned[::-1] == again
    other = [Request(r.prompt, r.max_tokens, seed=r.seed + 100) for r in requests]
    assert TransformersGenerator(model).generate(other, **settings) != whole
    # The global source of randomness is left alone.
    torch.manual_seed(0)
    before = torch.get_rng_state()
    TransformersGenerator(model).generate(requests, **settings)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7)])
def test_first_tokens_follow_the_softmax(
    model: LlamaForCausalLM, temperature: float, top_p: float
) -> None:
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    law = (logits / temperature).softmax(-1).numpy()
    kept, held = np.zeros(VOCABULARY, bool), 0.0
    for token in np.argsort(-law):
        kept[token] = True
        held += law[token]
        if held >= top_p:
            break
    law = np.where(kept, law, 0) / law[kept].sum()
    requests = [Request(PROMPTS[0], 1, seed=seed) for seed in range(2000)]
    found = TransformersGenerator(model, batch_size=500).generate(
        requests, stop=frozenset(), temperature=temperature, top_p=top_p
    )
    counts = np.bincount([c.tokens[0] for c in found], minlength=VOCABULARY)
    assert counts[~kept].sum() == 0
    # Rare tokens together, as the test asks for.
    rare = kept & (law * 2000 < 5)
    often = kept & ~rare
    observed = [*counts[often], counts[rare].sum()] if rare.any() else counts[often]
    expected = [*law[often], law[rare].sum()] if rare.any() else law[often]
    assert stats.chisquare(observed, np.array(expected) * 2000).pvalue > 1e-3


def test_draw_inverts_the_distribution_function() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    # Likeliest first: 1 up to 0.5, 3 up to 0.75, 2 up to 0.9, 0.
    for uniform, token in ((0.0, 1), (0.49, 1), (0.51, 3), (0.74, 3), (0.76, 2), (0.95, 0)):
        at = torch.tensor([uniform], dtype=torch.float64)
        assert draw(logits, at, temperature=1.0).item() == token
    # The top 0.7 are 1 and 3, at 2/3 and 1/3.
    for uniform, token in ((0.66, 1), (0.67, 3), (1 - 1e-16, 3)):
        at = torch.tensor([uniform], dtype=torch.float64)
        assert draw(logits, at, temperature=1.0, top_p=0.7).item() == token
    # The likeliest token stays however small top_p is.
    assert draw(logits, torch.tensor([0.99]).double(), temperature=1.0, top_p=1e-9).item() == 1


@pytest.mark.parametrize(
    ("request_", "settings", "message"),
    [
        (Request([], 3), {}, "request 0 has 0 tokens of prompt"),
        (Request([1], 0), {}, "request 0 .* asks for 0"),
        (Request([1] * 60, 5), {}, r"needs 65 tokens \(60 of its prompt.*takes 64"),
        (Request([1], 3), {"temperature": -1.0}, "temperature=-1.0 must be"),
        (Request([1], 3), {"temperature": math.inf}, "temperature=inf must be"),
        (Request([1], 3), {"temperature": math.nan}, "temperature=nan must be"),
        (Request([1], 3), {"temperature": 1.0, "top_p": 0.0}, "top_p=0.0 must be"),
    ],
)
def test_requests_that_cannot_be_met(
    model: LlamaForCausalLM, request_: Request, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TransformersGenerator(model).generate([request_], stop=frozenset(), **settings)


def test_vllm_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="pip install vllm"):
        VLLMGenerator("a-model")


def test_vllm_gets_its_documented_arguments(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Against a stand-in that keeps to vLLM's documented conventions: the stop token is among
    ``token_ids``, ``stop_token_ids`` are ignored for ``min_tokens``, a list of settings goes with
    a list of prompts. test_generation_vllm.py runs vLLM itself."""

    class LLM:
        def __init__(self, model: str, dtype: str, **_: Any) -> None:
            # Its own "auto" takes half of the bits of float32.
            assert dtype == "float32"
            limit = types.SimpleNamespace(max_model_len=64)
            self.llm_engine = types.SimpleNamespace(model_config=limit)

        def generate(
            self, prompts: Sequence[dict[str, list[int]]], settings: Sequence[Any], use_tqdm: bool
        ) -> list[Any]:
            outputs = []
            for prompt, each in zip(prompts, settings, strict=True):
                assert each.ignore_eos and each.temperature == 0
                request = Request(
                    prompt["prompt_token_ids"], each.max_tokens, each.seed, each.min_tokens
                )
                found = plain(model, request, frozenset(each.stop_token_ids))
                ids = [*found.tokens, *([] if found.stop is None else [found.stop])]
                outputs.append(
                    types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids)])
                )
            return outputs

    stand_in: Any = types.ModuleType("vllm")
    stand_in.LLM, stand_in.SamplingParams = LLM, lambda **said: types.SimpleNamespace(**said)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    requests = [Request(prompt, 6 + 5 * row, row, row) for row, prompt in enumerate(PROMPTS)]
    stop = frozenset(plain(model, requests[1], frozenset()).tokens[3:5])
    ours = TransformersGenerator(model).generate(requests, stop=stop)
    model.save_pretrained(tmp_path)
    generator = VLLMGenerator(str(tmp_path))
    assert generator.generate(requests, stop=stop) == ours
    assert {completion.stop is None for completion in ours} == {True, False}
    assert generator.context == 64 and generator.generate([], stop=stop) == []
