"""vLLM itself against transformers, where vLLM is installed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from iwsft.language.generation import Completion, Request, TransformersGenerator, VLLMGenerator

pytest.importorskip("vllm")

# Starting an engine compiles the model.
pytestmark = pytest.mark.timeout(1800)
VOCABULARY = 61
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [30, 31]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose files are float32, and whose own settings of generation would change it."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        # vLLM's attention on a CPU takes heads of 32 numbers and more.
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        # Wide enough that greedy tokens differ from step to step.
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=40,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.update(do_sample=True, temperature=0.3, top_k=1, repetition_penalty=9.0)
    model.save_pretrained(folder)
    words = {f"t{number}": number for number in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="t1", eos_token="t40")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> TransformersGenerator:
    return TransformersGenerator(LlamaForCausalLM.from_pretrained(folder))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VLLMGenerator]:
    before = {*psutil.Process().children(recursive=True)}
    with pytest.MonkeyPatch.context() as patch:
        # GiB; on a CPU vLLM would take most of the memory.
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        generator = VLLMGenerator(str(folder))
    yield generator
    started = {*psutil.Process().children(recursive=True)} - before
    generator.close()
    _, left = psutil.wait_procs(started, timeout=60)
    assert not [each for each in left if each.memory_info().rss > 100 * 2**20], "weights stay"


def test_greedy_tokens_stops_and_cuts(engine: VLLMGenerator, ours: TransformersGenerator) -> None:
    requests = [Request(prompt, 6 + 5 * row, row) for row, prompt in enumerate(PROMPTS)]
    free = ours.generate(requests, stop=frozenset())
    # The model's own end token ends nothing, and bfloat16 would give other tokens.
    assert any(40 in completion.tokens for completion in free)
    assert engine.generate(requests, stop=frozenset()) == free

    # vLLM holds back the model's own end token, too, among the first.
    stop = frozenset({40, free[1].tokens[0], free[3].tokens[4]})
    requests = [replace(request, min_tokens=least) for request in requests for least in (0, 1, 3)]
    expected = ours.generate(requests, stop=stop)
    assert {completion.stop is None for completion in expected} == {True, False}
    assert Completion((), free[1].tokens[0]) in expected
    assert engine.generate(requests, stop=stop) == expected


def test_prompts_too_long_are_refused_alike(
    engine: VLLMGenerator, ours: TransformersGenerator
) -> None:
    assert engine.context == ours.context == 64
    whole = [Request([3] * 60, 4), Request([3] * 63, 1)]
    assert engine.generate(whole, stop=frozenset()) == ours.generate(whole, stop=frozenset())
    for generator in (engine, ours):
        with pytest.raises(ValueError, match=r"needs 65 tokens \(60 of its prompt.*takes 64"):
            generator.generate([Request([3] * 60, 5)], stop=frozenset())


def test_a_seed_fixes_the_tokens(engine: VLLMGenerator) -> None:
    # Seeds of the command line have up to 62 bits.
    requests = [Request(PROMPTS[seed % 4], 20, 2**62 - 1 - seed) for seed in range(8)]
    samples = engine.generate(requests, stop=frozenset({3}), temperature=1.5, top_p=0.9)
    assert engine.generate(requests, stop=frozenset({3}), temperature=1.5, top_p=0.9) == samples
    turned = engine.generate(requests[::-1], stop=frozenset({3}), temperature=1.5, top_p=0.9)
    assert turned[::-1] == samples
    assert len({each.tokens for each in samples}) == 8


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 0.7)])
def test_first_tokens_follow_the_softmax(
    engine: VLLMGenerator, folder: Path, temperature: float, top_p: float
) -> None:
    with torch.no_grad():
        model = LlamaForCausalLM.from_pretrained(folder)
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    law, order = (logits / temperature).softmax(-1).sort(descending=True)
    law = law * (law.cumsum(-1) - law < top_p)
    law /= law.sum()
    requests = [Request(PROMPTS[0], 1, seed) for seed in range(2000)]
    found = engine.generate(requests, stop=frozenset(), temperature=temperature, top_p=top_p)
    counts = Counter(each.tokens[0] for each in found)
    observed = torch.tensor([float(counts[token]) for token in order.tolist()])
    assert observed[law == 0].sum() == 0
    # Rare tokens together, as the test asks for.
    rare = (law > 0) & (law * 2000 < 5)
    often = (law > 0) & ~rare
    groups = [
        [*each[often].tolist(), *([float(each[rare].sum())] if rare.any() else [])]
        for each in (observed.double(), law * 2000)
    ]
    assert stats.chisquare(*groups).pvalue > 1e-3
