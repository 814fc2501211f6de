"""The memory calculator against real tensors and against published sizes."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from benchmarks.llm.memory import (
    QWEN2,
    DecoderSizes,
    Options,
    Setup,
    main,
    training_memory,
)
from benchmarks.llm.models import with_adapters
from iwsft.language.shards import Shards
from iwsft.policies import CausalLMPolicy

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
QWEN_7B = QWEN2["7B"]


def test_parameters_of_a_published_model() -> None:
    # Qwen2.5-7B: 7.61B, of them 6.53B outside the embeddings (its model card).
    sizes = DecoderSizes.of(QWEN_7B)
    assert sizes.parameters == 7_615_616_512
    assert (sizes.parameters - 2 * 152_064 * 3584) / 1e9 == pytest.approx(6.53, abs=0.005)


@pytest.mark.parametrize("family", [Qwen2Config, LlamaConfig])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_keeps_what_was_computed(family: Any, dtype: torch.dtype) -> None:
    tokens = 32
    kept = []
    for layers in (1, 3):
        config = family(**{**TINY, "num_hidden_layers": layers})
        kept.append(saved_bytes(AutoModelForCausalLM.from_config(config, dtype=dtype), tokens))
    found = (kept[1] - kept[0]) // 2
    width = torch.finfo(dtype).bits // 8
    assert found == tokens * DecoderSizes.of(config).layer_activations(width)


def saved_bytes(model: Any, tokens: int) -> int:
    """Bytes that autograd keeps, weights apart, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, tuple[int, Any]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.train().model(torch.arange(tokens)[None], use_cache=False)
    return sum(size for size, _ in saved.values())


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were made within and are alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, out)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            weakref.finalize(storage, self._alive.pop, key)
            self.most = max(self.most, sum(self._alive.values()))


@pytest.mark.parametrize(
    ("own", "tokens", "checkpointing"),
    [
        ({"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 512}, 1024, True),
        ({"vocab_size": 512, "intermediate_size": 512, "num_hidden_layers": 6}, 1024, False),
    ],
)
def test_peak_of_forward_and_backward(own: Any, tokens: int, checkpointing: bool) -> None:
    config = Qwen2Config(**{**TINY, **own, "tie_word_embeddings": False})
    model = AutoModelForCausalLM.from_config(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch = TensorDict(
        {
            ("tokens", "full"): torch.arange(tokens) % 500,
            ("masks", "all_assistant_mask"): torch.ones(tokens, dtype=torch.bool),
            ("collector", "traj_ids"): torch.zeros(tokens, dtype=torch.long),
        },
        batch_size=[tokens],
    )
    with Peak() as peak:
        # Twice, as in accumulation: gradients are there already.
        for _ in range(2):
            CausalLMPolicy(model).log_prob(batch).mean().backward()
    setup = Setup(
        "single", 1, half=False, checkpointing=checkpointing, tokens=tokens, accelerator=False
    )
    memory = training_memory(DecoderSizes.of(config), setup)
    # What was there before, and what only the optimizer makes.
    computed = memory.gpu - memory.weights - memory.optimizer
    assert peak.most / 1.17 < computed < 1.17 * peak.most


def test_states_of_a_single_process() -> None:
    config = Qwen2Config(**TINY)
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    moments = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    memory = training_memory(
        DecoderSizes.of(config), Setup("single", 1, half=False, proposal="lagged")
    )
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert memory.optimizer == sum(moment.nbytes for moment in moments)
    q = Shards(model).state_dict()
    assert memory.shadow == sum(part.nbytes for part in q.values())


def test_sharding_divides_and_the_moving_average_adds_four_bytes() -> None:
    sizes = DecoderSizes.of(QWEN_7B)
    for engine, bytes_each in (("zero2", 2 + 14 / 8), ("zero3", 16 / 8), ("fsdp2", 16 / 8)):
        plain = training_memory(sizes, Setup(engine))
        lagged = training_memory(sizes, Setup(engine, proposal="lagged"))
        cached = training_memory(sizes, Setup(engine, proposal="cached"))
        states = plain.weights + plain.gradients + plain.optimizer
        assert states / sizes.parameters == pytest.approx(bytes_each, rel=1e-6)
        assert cached == plain
        assert lagged.shadow / sizes.parameters == pytest.approx(4 / 8, rel=1e-6)
    two_nodes = training_memory(sizes, Setup("zero3", 16, 2))
    assert two_nodes.optimizer * 2 == pytest.approx(training_memory(sizes, Setup()).optimizer)


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    sizes = DecoderSizes.of(QWEN_7B)
    plain = training_memory(sizes, Setup())
    offloaded = training_memory(sizes, Setup(offload_optimizer=True, proposal="lagged"))
    assert offloaded.optimizer == offloaded.gradients == offloaded.shadow == 0
    assert offloaded.weights == plain.weights
    # Master, two moments, gradients in float32 and as they come in; and the moving average.
    assert offloaded.host / sizes.parameters == pytest.approx(12 + 4 + 2 + 4, rel=1e-6)
    spread = training_memory(sizes, Setup("zero3", 16, 2, offload_optimizer=True))
    assert spread.host / sizes.parameters == pytest.approx(18 / 2, rel=1e-6)


def test_adapters_need_states_of_their_own_alone() -> None:
    config = Qwen2Config(**TINY)
    whole = DecoderSizes.of(config)
    few = training_memory(DecoderSizes.of(config, trainable=1000), Setup("zero3", 2))
    assert few.weights == whole.parameters
    assert (few.gradients, few.optimizer) == (1000, 6000)
    counted = with_adapters(Qwen2ForCausalLM(config), 4, seed=0).get_nb_trainable_parameters()[0]
    assert DecoderSizes.of(config, lora_rank=4).trainable == counted


def test_more_tokens_take_more_and_checkpoints_less() -> None:
    sizes = DecoderSizes.of(QWEN_7B)
    short, long, whole = (
        training_memory(sizes, Setup(tokens=tokens, checkpointing=checkpointing))
        for tokens, checkpointing in ((8_000, True), (16_000, True), (16_000, False))
    )
    assert short.work < long.work < whole.work and short.weights == long.weights
    # Without checkpoints every layer keeps its activations; with them its input.
    kept = 28 * (sizes.layer_activations(2) - 2 * 3584)
    assert whole.work - long.work == 16_000 * (kept - sizes.layer_activations(2))


def test_the_table_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    main(Options(tokens=4096))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == len(QWEN2) * 8
    assert len({line.count("|") for line in lines}) == 1
    for line in (line for line in lines if " x " in line):
        numbers = [float(cell) for cell in line.strip("|").split("|")[1:]]
        assert sum(numbers[:4]) == pytest.approx(numbers[4], abs=0.21)


def test_hardware_of_the_tables_is_checked() -> None:
    with pytest.raises(SystemExit, match="--gpus 0: at least 1"):
        main(Options(gpus=0))


def test_models_it_does_not_know() -> None:
    experts = MixtralConfig(**TINY, num_local_experts=2)
    with pytest.raises(ValueError, match="mixture of experts"):
        DecoderSizes.of(experts)
    with pytest.raises(ValueError, match="trainable=0"):
        DecoderSizes.of(Qwen2Config(**TINY), trainable=0)
