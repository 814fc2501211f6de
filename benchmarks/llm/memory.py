"""Compute how much memory fine-tuning takes, before it is tried: the tables of docs/scaling.md.

Examples:
    python -m benchmarks.llm.memory
    python -m benchmarks.llm.memory --model Qwen/Qwen2.5-14B-Instruct --gpus 4 --tokens 8192
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import Annotated, Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from benchmarks.options import check_at_least, option, parse
from benchmarks.stopping import ends_in_one_line
from iwsft.objective import Proposal
from iwsft.policies.token_log_prob import _ACCELERATOR_BLOCK, _CPU_BLOCK

# Each packaged config, as fields of Setup.
ENGINES: dict[str, dict[str, Any]] = {
    "single": {"engine": "single", "processes": 1},
    "zero2": {"engine": "zero2"},
    "zero3": {"engine": "zero3"},
    "zero3_offload": {"engine": "zero3", "offload_optimizer": True},
    "fsdp2": {"engine": "fsdp2"},
    "multi_node": {"engine": "zero3"},
}
# Published shapes of Qwen2.5.
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "vocab_size"),
)
_SHAPES: dict[str, tuple[Any, ...]] = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "7B": (3584, 18_944, 28, 28, 4, 152_064),
    "32B": (5120, 27_648, 64, 40, 8, 152_064),
}
QWEN2 = {
    name: Qwen2Config(**dict(zip(_SIZES, shape, strict=True)), tie_word_embeddings=name == "0.5B")
    for name, shape in _SHAPES.items()
}
# Bytes of a float32.
_WIDE = 4
# As in the packaged DeepSpeed configs, in parameters.
REDUCE_BUCKET = 50_000_000
_LIVE_PARAMETERS = _SUB_GROUP = 1_000_000_000
# Assumed: context, libraries and communication buffers of a GPU.
_RUNTIME = 2_000_000_000


@dataclass(frozen=True)
class DecoderSizes:
    """Sizes of a dense decoder that decide its memory: its text config, and parameter counts."""

    text: Any
    parameters: int
    trainable: int
    layer: int

    @classmethod
    def of(
        cls, config: Any, *, trainable: int | None = None, lora_rank: int | None = None
    ) -> DecoderSizes:
        """Count the parameters of a transformers config on a model without memory.

        ``trainable`` is less than all with adapters, such as LoRA of ``lora_rank`` on all linear
        layers.
        """
        text = config.get_text_config()
        if getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None):
            raise ValueError(f"{text.model_type} is a mixture of experts; only dense models work")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        parameters, head = model.num_parameters(), model.get_output_embeddings()
        if lora_rank is not None:
            linear = (each for each in model.modules() if isinstance(each, torch.nn.Linear))
            sizes = (each.in_features + each.out_features for each in linear if each is not head)
            trainable = lora_rank * sum(sizes)
        if trainable is not None and not 0 < trainable <= parameters:
            raise ValueError(f"trainable={trainable} must be in [1, {parameters}], the parameters")
        layer = max(
            sum(parameter.numel() for parameter in layer.parameters())
            for layers in model.modules()
            if isinstance(layers, torch.nn.ModuleList) and len(layers) == text.num_hidden_layers
            for layer in layers
        )
        return cls(text, parameters, trainable or parameters, layer)

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        own = getattr(self.text, "head_dim", None)
        return own or self.text.hidden_size // self.text.num_attention_heads

    def norm_activations(self, width: int) -> int:
        """Bytes per token of a norm: float32 input, a factor, states before and after weights."""
        return 4 * self.text.hidden_size + 4 + 2 * width * self.text.hidden_size

    def layer_activations(self, width: int) -> int:
        """Bytes per token that a layer of Llama and its like keeps for backward, attention fused.

        Two norms, rotated queries and keys, values, attention's output and log-normalisers, and
        four tensors of the feed-forward block; numbers have ``width`` bytes.
        """
        heads = self.text.num_attention_heads
        key_heads = getattr(self.text, "num_key_value_heads", None) or heads
        attention = width * 2 * (heads + key_heads) * self.head_width + 4 * heads
        feed_forward = width * 4 * self.text.intermediate_size
        return 2 * self.norm_activations(width) + attention + feed_forward

    def all_activations(self, setup: Setup) -> tuple[int, int]:
        """Bytes that all layers keep for backward, and those of a layer or the log-probs at work.

        At work are the gradients inside the feed-forward block, the widest, and what checkpointing
        computes again. The fused output layer has states and their float32 gradient, a block of
        logits (with its gradient as a factor of products, and a temporary), and a block of weights.
        """
        width, hidden, tokens = setup.width, self.text.hidden_size, setup.tokens
        again = self.layer_activations(width)
        saved = self.text.num_hidden_layers * (width * hidden if setup.checkpointing else again)
        layer = width * (3 * self.text.intermediate_size + hidden)
        layer += again if setup.checkpointing else 0
        rows, columns = _ACCELERATOR_BLOCK if setup.accelerator else _CPU_BLOCK
        rows, columns = min(rows, tokens), min(columns, self.text.vocab_size)
        blocks = rows * columns * (2 * _WIDE + width) + _WIDE * columns * hidden
        log_probs = tokens * hidden * (2 * width + _WIDE) + blocks
        stored = tokens * (saved + self.norm_activations(width) + 2 * width * self.head_width + 8)
        return stored, max(tokens * layer, log_probs)


@dataclass(frozen=True)
class Setup:
    """How a model is trained, on the GPUs (``processes``) of all ``nodes``.

    ``half`` is bfloat16; ``tokens`` are those of a micro-batch. ``offload_optimizer`` is ZeRO-3's.
    """

    engine: Literal["single", "zero2", "zero3", "fsdp2"] = "zero3"
    processes: int = 8
    nodes: int = 1
    offload_optimizer: bool = False
    half: bool = True
    checkpointing: bool = True
    tokens: int = 4096
    proposal: Proposal = "current"
    accelerator: bool = True

    @property
    def width(self) -> int:
        """Bytes of a number in the matrix products."""
        return 2 if self.half else _WIDE


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU (or process on the CPU), and of a node's host.

    ``optimizer`` is Adam's moments, and float32 weights next to half-precision ones. ``shadow`` is
    the moving average of theta. ``work`` is the most that is needed on top of the others at a time.
    """

    weights: int
    gradients: int
    optimizer: int
    shadow: int
    buckets: int
    work: int
    host: int

    @property
    def gpu(self) -> int:
        """All of a GPU's memory at the most."""
        return sum(astuple(self)) - self.host


def training_memory(sizes: DecoderSizes, setup: Setup) -> Memory:
    """Compute the memory of fine-tuning with AdamW; docs/scaling.md tells how well it is known.

    Gathered weights follow the limits in the packaged configs. Not included: what allocators lose
    between blocks, and the masks of a packed row without variable-length attention.
    """
    width, trained = setup.width, sizes.trainable
    frozen, head = sizes.parameters - trained, sizes.text.vocab_size * sizes.text.hidden_size
    # The largest part that is gathered at once.
    largest = max(sizes.layer, head)
    part = min(trained, largest)
    local = setup.processes // setup.nodes
    host = buckets = step = shadow = swap = 0

    def share(total: int) -> int:
        return -(-total // setup.processes)

    if setup.engine == "single":
        weights = _WIDE * trained + width * frozen
        gradients, optimizer = _WIDE * trained, 8 * trained
        # A gradient on its way to the sum; autocast's casts of the weights.
        gathered = _WIDE * part + (width * trained if setup.half else 0)
    elif setup.engine == "fsdp2":
        # Half precision is a cast of gathered float32 weights.
        weights = share(_WIDE * trained + width * frozen)
        gradients, optimizer = share(_WIDE * trained), share(8 * trained)
        # A layer at work, the next one, gradients on their way; the output layer stays gathered.
        gathered = width * (3 * sizes.layer + head + part)
    elif setup.engine == "zero2":
        weights, gradients = width * sizes.parameters, share(width * trained)
        optimizer, step = share(12 * trained), share(_WIDE * trained)
        buckets, gathered = 2 * width * REDUCE_BUCKET, width * part
    else:
        weights, gradients = share(width * sizes.parameters), share(width * trained)
        # The float32 copy of the weights is there for float32 weights too.
        optimizer, step = share(12 * trained), min(_WIDE * _SUB_GROUP, share(_WIDE * trained))
        buckets = width * REDUCE_BUCKET
        gathered = width * (min(sizes.parameters, _LIVE_PARAMETERS + largest) + part)
        if setup.offload_optimizer:
            # With the optimizer: the gradients as they come in, and in float32.
            host = local * (optimizer + gradients + share(_WIDE * trained))
            gradients = optimizer = step = 0
    if setup.proposal == "lagged":
        shadow = share(_WIDE * trained)
        swap = share((width if setup.engine.startswith("zero") else _WIDE) * trained)
        if setup.offload_optimizer:
            host, shadow = host + local * shadow, 0
    activations, forward = sizes.all_activations(setup)
    work = max(gathered + forward + max(activations, swap), step)
    runtime = _RUNTIME if setup.accelerator else 0
    return Memory(weights, gradients, optimizer, shadow, buckets, work + runtime, host)


@dataclass(frozen=True)
class Options:
    """The model and the hardware of the tables."""

    model: Annotated[str | None, option("ID|DIR", "Qwen2.5 with 0.5B, 7B and 32B parameters")] = (
        None
    )
    """Hub id or folder."""
    gpus: int = 8
    """GPUs of a node."""
    nodes: int = 2
    """Nodes of ``multi_node``."""
    tokens: int = 22_000
    """Tokens of a micro-batch, padding included."""
    trainable: Annotated[int | None, option("INT", "all")] = None
    """Parameters that are trained, where adapters are."""


def _table(sizes: DecoderSizes, options: Options) -> Iterator[str]:
    """Markdown in GB (10^9 bytes): a GPU by kind and in all, a node's host, both with EMA."""
    names = "weights", "gradients", "optimizer", "at work", "**GPU**", "host"
    yield f"|  | {' | '.join(names)} | **GPU, EMA** | host, EMA |"
    yield "|---" + "|---:" * 8 + "|"
    for name, engine in ENGINES.items():
        nodes = options.nodes if name == "multi_node" else 1
        fields = {"processes": options.gpus * nodes, "nodes": nodes, **engine}
        setup = Setup(tokens=options.tokens, **fields)
        plain = training_memory(sizes, setup)
        lagged = training_memory(sizes, replace(setup, proposal="lagged"))
        states = plain.weights, plain.gradients, plain.optimizer
        numbers = *states, plain.gpu - sum(states), plain.gpu, plain.host, lagged.gpu, lagged.host
        cells = [f"{name} x {setup.processes}", *(f"{number / 1e9:.1f}" for number in numbers)]
        yield f"| {' | '.join(cells)} |"


@ends_in_one_line()
def main(options: Options) -> None:
    """Print a table for each model."""
    check_at_least(1, gpus=options.gpus, nodes=options.nodes, tokens=options.tokens)
    configs: dict[str, Any] = dict(QWEN2)
    if options.model is not None:
        configs = {options.model: AutoConfig.from_pretrained(options.model)}
    for name, config in configs.items():
        sizes = DecoderSizes.of(config, trainable=options.trainable)
        print(f"{name}, {sizes.parameters:,} parameters:\n")
        print("\n".join(_table(sizes, options)), end="\n\n")


if __name__ == "__main__":
    main(parse(Options, "llm.memory", __doc__))
