"""Memory of fine-tuning by config and q, before anything is tried: the tables of docs/scaling.md.

python -m benchmarks.llm.scaling

python -m benchmarks.llm.scaling --model Qwen/Qwen2.5-14B-Instruct --gpus 4 --tokens 8192
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from benchmarks.command import ends_in_one_line
from iwsft.language.memory import DecoderSizes, Memory, Setup, table, training_memory

# Qwen2.5's published shapes.
MODELS: dict[str, dict[str, Any]] = {
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
    "32B": {
        "hidden_size": 5120,
        "intermediate_size": 27_648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "single": {"engine": "single", "processes": 1},
    "zero2": {"engine": "zero2"},
    "zero3": {"engine": "zero3"},
    "zero3_offload": {"engine": "zero3", "offload_optimizer": True},
    "fsdp2": {"engine": "fsdp2"},
    "multi_node": {"engine": "zero3"},
}


@dataclass(frozen=True)
class Arguments:
    """What is asked.

    Attributes:
        model: hub id or folder; by default Qwen2.5 with 0.5B, 7B and 32B parameters.
        gpus: of a node.
        nodes: of ``multi_node``.
        tokens: of a micro-batch, padding included.
        trainable: parameters that are trained, where adapters are; by default all.
    """

    model: Annotated[str | None, tyro.conf.arg(metavar="ID|DIR")] = None
    gpus: int = 8
    nodes: int = 2
    tokens: int = 22_000
    trainable: int | None = None


def rows(sizes: DecoderSizes, arguments: Arguments) -> Iterator[tuple[str, Memory, Memory]]:
    """Each config, with a q that needs no memory and with the moving average."""
    for config, settings in CONFIGS.items():
        nodes = arguments.nodes if config == "multi_node" else 1
        asked = {"processes": arguments.gpus * nodes, "nodes": nodes, **settings}
        setup = Setup(tokens=arguments.tokens, **asked)
        plain, lagged = (
            training_memory(sizes, replace(setup, proposal=proposal))
            for proposal in ("current", "lagged")
        )
        yield f"{config} x {setup.processes}", plain, lagged


def main(arguments: Arguments) -> None:
    """Print a table for each model."""
    from transformers import AutoConfig, Qwen2Config

    with ends_in_one_line():
        if arguments.model is None:
            configs = {name: Qwen2Config(**shape) for name, shape in MODELS.items()}
        else:
            configs = {arguments.model: AutoConfig.from_pretrained(arguments.model)}
        for name, config in configs.items():
            sizes = DecoderSizes.of(config, trainable=arguments.trainable)
            print(f"{name}, {sizes.parameters:,} parameters:\n")
            print(table(list(rows(sizes, arguments))), end="\n\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.llm.scaling", description=__doc__))
