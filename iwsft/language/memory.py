"""How much memory fine-tuning a decoder takes, on a GPU and on the host, before it is tried."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from iwsft.objective import Proposal
from iwsft.policies.token_log_prob import _ACCELERATOR_BLOCK, _CPU_BLOCK

Engine = Literal["single", "zero2", "zero3", "fsdp2"]

# As in the packaged DeepSpeed configs.
REDUCE_BUCKET = 50_000_000
LIVE_PARAMETERS = 1_000_000_000
SUB_GROUP = 1_000_000_000
# Assumed, not measured: context, libraries and communication buffers of a GPU.
RUNTIME = 2_000_000_000


@dataclass(frozen=True)
class DecoderSizes:
    """What of a dense decoder decides its memory.

    Attributes:
        parameters: all of them, tied ones once.
        trainable: of them; fewer with adapters.
        layers: decoder layers.
        hidden: width of the states.
        intermediate: width inside the feed-forward block.
        query: heads times their width.
        key: key-value heads times their width.
        heads: of attention.
        vocabulary: tokens.
        layer: parameters of a layer.
        largest: parameters of the largest part that is gathered at once.
    """

    parameters: int
    trainable: int
    layers: int
    hidden: int
    intermediate: int
    query: int
    key: int
    heads: int
    vocabulary: int
    layer: int
    largest: int

    @classmethod
    def of(cls, config: Any, *, trainable: int | None = None) -> DecoderSizes:
        """Of a transformers config; parameters are counted on a model without memory.

        Args:
            config: such as ``AutoConfig.from_pretrained(name)``.
            trainable: parameters that are trained; by default all.

        Raises:
            ValueError: a mixture of experts, or ``trainable`` beyond what the model has.
        """
        from transformers import AutoModelForCausalLM

        text = config.get_text_config()
        if getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None):
            raise ValueError(
                f"{text.model_type} is a mixture of experts; memory is computed for dense decoders"
            )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        layers = _layers(model, text.num_hidden_layers)
        layer = max(sum(p.numel() for p in one.parameters()) for one in layers)
        trained = parameters if trainable is None else trainable
        if not 0 < trained <= parameters:
            raise ValueError(f"trainable={trained} must be in [1, {parameters}], the parameters")
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        key_heads = getattr(text, "num_key_value_heads", None) or heads
        inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None)
        return cls(
            parameters=parameters,
            trainable=trained,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=inner or 4 * text.hidden_size,
            query=heads * width,
            key=key_heads * width,
            heads=heads,
            vocabulary=text.vocab_size,
            layer=layer,
            largest=max(layer, text.vocab_size * text.hidden_size),
        )


def _layers(model: Any, number: int) -> Any:
    """The list of decoder layers."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == number:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {number} layers")


@dataclass(frozen=True)
class Setup:
    """How it is trained.

    Attributes:
        engine: ``"single"`` process, DeepSpeed's ``"zero2"`` or ``"zero3"``, torch's ``"fsdp2"``.
        processes: GPUs, of all nodes.
        nodes: that hold as many processes each.
        offload_optimizer: ZeRO-3 with float32 weights and Adam's moments in host memory.
        half: bfloat16 (mixed precision); otherwise float32.
        checkpointing: gradient checkpointing, one checkpoint a layer.
        tokens: of a micro-batch, padding included.
        trained_tokens: of them, those of the assistant; by default all.
        proposal: what q is; see :class:`~iwsft.language.config.ImportanceWeightedConfig`.
        accelerator: False on a CPU, where logits come in smaller blocks.
        reduce_bucket: DeepSpeed's ``reduce_bucket_size``.

    Raises:
        ValueError: what no engine does.
    """

    engine: Engine = "zero3"
    processes: int = 8
    nodes: int = 1
    offload_optimizer: bool = False
    half: bool = True
    checkpointing: bool = True
    tokens: int = 4096
    trained_tokens: int | None = None
    proposal: Proposal = "current"
    accelerator: bool = True
    reduce_bucket: int = REDUCE_BUCKET

    def __post_init__(self) -> None:
        if self.engine not in get_args(Engine):
            raise ValueError(f"engine={self.engine!r} must be one of {get_args(Engine)}")
        if self.proposal not in get_args(Proposal):
            raise ValueError(f"proposal={self.proposal!r} must be one of {get_args(Proposal)}")
        if self.engine == "single" and self.processes != 1:
            raise ValueError(f"processes={self.processes}: engine='single' is one process")
        if self.offload_optimizer and self.engine != "zero3":
            raise ValueError(f"offload_optimizer goes with engine='zero3', not {self.engine!r}")
        if self.nodes < 1 or self.processes < 1 or self.processes % self.nodes:
            raise ValueError(
                f"processes={self.processes} and nodes={self.nodes}: each node has as many"
            )
        trained = self.tokens if self.trained_tokens is None else self.trained_tokens
        if not 1 <= trained <= self.tokens:
            raise ValueError(f"tokens={self.tokens}, of them {trained} trained: at least 1 is")


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU (or process on the CPU), and of the host.

    Attributes:
        weights: that stay: all, or this process's shard.
        gradients: that stay until the step.
        optimizer: float32 weights beside half-precision ones, and Adam's two moments.
        shadow: the moving average of theta, float32 (``proposal="lagged"``), where the optimizer
            is; hard syncs (``"cached"``) have none.
        buckets: of communication.
        runtime: context and libraries, assumed.
        gathered: weights that are whole while they work, casts of them, and whole gradients of the
            part at work.
        activations: of a micro-batch, between forward and backward.
        layer: of the layer at work in backward.
        log_probs: of the fused output layer: states, their gradient, blocks of logits.
        step: what the optimizer's step takes while it lasts.
        swap: weights set aside while the model answers as the shadow.
        host: of a node.
    """

    weights: int
    gradients: int
    optimizer: int
    shadow: int
    buckets: int
    runtime: int
    gathered: int
    activations: int
    layer: int
    log_probs: int
    step: int
    swap: int
    host: int

    @property
    def states(self) -> int:
        """What is there all the time, apart from the runtime."""
        return self.weights + self.gradients + self.optimizer + self.shadow + self.buckets

    @property
    def gpu(self) -> int:
        """The most at a time: in backward, in the step, or as the shadow."""
        backward = self.gathered + self.activations + max(self.layer, self.log_probs)
        answering = self.swap + self.gathered + max(self.layer, self.log_probs)
        return self.states + self.runtime + max(backward, self.step, answering)


def training_memory(sizes: DecoderSizes, setup: Setup) -> Memory:
    """Memory of fine-tuning with AdamW and :class:`~iwsft.language.trainer
    .ImportanceWeightedTrainer`.

    Compared with the tensors of tiny models, byte by byte: the states of ZeRO-2 and ZeRO-3, with
    and without offloading, and what a layer keeps. The most at a time of a single process, forward
    and backward, was within a sixth. FSDP2 follows from what torch shards; gathered weights follow
    the limits in the packaged configs. Not included: what allocators lose between blocks, and the
    masks of a packed row without variable-length attention (tokens squared).

    Args:
        sizes: of the model.
        setup: how it is trained.
    """
    wide, width = 4, 2 if setup.half else 4
    trained = sizes.trainable
    frozen = sizes.parameters - trained
    shards = setup.processes if setup.engine in ("zero3", "fsdp2") else 1
    local = setup.processes // setup.nodes
    host = weights = gradients = optimizer = buckets = gathered = step = 0
    if setup.engine == "single":
        weights, gradients, optimizer = wide * trained + width * frozen, wide * trained, 8 * trained
        # A gradient on its way to what is accumulated; autocast's casts of the weights.
        gathered = wide * min(trained, sizes.largest) + (width * trained if setup.half else 0)
    elif setup.engine == "fsdp2":
        # Half precision is a cast of gathered float32 weights.
        weights = _share(wide * trained + width * frozen, shards)
        gradients, optimizer = _share(wide * trained, shards), _share(8 * trained, shards)
        # A layer at work, the next one, gradients on their way; the output layer stays gathered.
        output = sizes.vocabulary * sizes.hidden
        gathered = width * (3 * sizes.layer + output + min(trained, sizes.largest))
    elif setup.engine == "zero2":
        weights = width * sizes.parameters
        gradients = _share(width * trained, setup.processes)
        optimizer = _share(12 * trained, setup.processes)
        buckets = 2 * width * setup.reduce_bucket
        gathered = width * min(trained, sizes.largest)
        step = _share(wide * trained, setup.processes)
    else:
        weights = _share(width * sizes.parameters, shards)
        gradients = _share(width * trained, shards)
        # The float32 copy of the weights is there for float32 weights too.
        optimizer = _share(12 * trained, shards)
        buckets = width * setup.reduce_bucket
        live = min(sizes.parameters, LIVE_PARAMETERS + sizes.largest)
        gathered = width * (live + min(trained, sizes.largest))
        step = min(wide * SUB_GROUP, _share(wide * trained, shards))
        if setup.offload_optimizer:
            # Beside the optimizer's: the gradients as they come in, and in float32.
            host = local * (optimizer + gradients + _share(wide * trained, shards))
            gradients = optimizer = step = 0
    shadow = swap = 0
    if setup.proposal == "lagged":
        deepspeed = setup.engine in ("zero2", "zero3")
        shadow = _share(wide * trained, setup.processes)
        swap = _share((width if deepspeed else wide) * trained, setup.processes)
        if setup.offload_optimizer:
            host, shadow = host + local * shadow, 0
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        shadow=shadow,
        buckets=buckets,
        runtime=RUNTIME if setup.accelerator else 0,
        gathered=gathered,
        activations=_activations(sizes, setup, width),
        layer=_layer(sizes, setup, width),
        log_probs=_log_probs(sizes, setup, width),
        step=step,
        swap=swap,
        host=host,
    )


def _share(total: int, shards: int) -> int:
    return -(-total // shards)


def layer_activations(sizes: DecoderSizes, width: int) -> int:
    """Bytes a token that a decoder layer keeps for backward, with fused attention.

    Llama and its kin (Qwen2, Mistral, ...): two norms in float32, rotated queries and keys, values,
    attention's output and log-normalisers, and four tensors of the feed-forward block.

    Args:
        sizes: of the model.
        width: bytes of a number.
    """
    norms = 2 * _norm(sizes, width)
    attention = width * 2 * (sizes.query + sizes.key) + 4 * sizes.heads
    return norms + attention + width * 4 * sizes.intermediate


def _norm(sizes: DecoderSizes, width: int) -> int:
    # The input in float32, one factor, the normalised states before and after their weights.
    return 4 * sizes.hidden + 4 + 2 * width * sizes.hidden


def _activations(sizes: DecoderSizes, setup: Setup, width: int) -> int:
    """What the layers keep, or their inputs, and the last norm, positions and their rotations."""
    kept = width * sizes.hidden if setup.checkpointing else layer_activations(sizes, width)
    rotary = 2 * width * (sizes.query // sizes.heads)
    return setup.tokens * (sizes.layers * kept + _norm(sizes, width) + rotary + 8)


def _layer(sizes: DecoderSizes, setup: Setup, width: int) -> int:
    """Gradients within the feed-forward block, the widest; before, what was not kept again."""
    again = layer_activations(sizes, width) if setup.checkpointing else 0
    return setup.tokens * (again + width * (3 * sizes.intermediate + sizes.hidden))


def _log_probs(sizes: DecoderSizes, setup: Setup, width: int) -> int:
    """States of trained tokens and their float32 gradient, a block of logits and one of weights."""
    trained = setup.tokens if setup.trained_tokens is None else setup.trained_tokens
    rows, columns = _ACCELERATOR_BLOCK if setup.accelerator else _CPU_BLOCK
    rows, columns = min(rows, trained), min(columns, sizes.vocabulary)
    # Logits, their gradient as a factor of products, and a temporary.
    block = rows * columns * (4 + 4 + width)
    return trained * sizes.hidden * (2 * width + 4) + block + 4 * columns * sizes.hidden


def table(rows: Sequence[tuple[str, Memory, Memory]]) -> str:
    """Markdown, GB (10^9 bytes): a GPU by kind and in all, a node's host, both with another q.

    Args:
        rows: name, memory without and with a moving average.
    """
    head = ["", "weights", "gradients", "optimizer", "at work", "**GPU**", "host"]
    head += ["**GPU, EMA**", "host, EMA"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, plain, lagged in rows:
        states = (plain.weights, plain.gradients, plain.optimizer)
        numbers = [*states, plain.gpu - sum(states), plain.gpu, plain.host, lagged.gpu, lagged.host]
        lines.append("| " + " | ".join([name, *(f"{n / 1e9:.1f}" for n in numbers)]) + " |")
    return "\n".join(lines)
