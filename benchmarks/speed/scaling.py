"""Cost over size: time and memory of each stage as the data grow, and the slopes of their logs."""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.d4rl.options import QUALITY_BINS
from benchmarks.d4rl.run import sizes as widths
from benchmarks.report import figures
from benchmarks.report.document import INK
from benchmarks.speed import control
from benchmarks.speed.measure import Cost, measured, slope
from benchmarks.speed.options import Options
from iwsft.curation import curate
from iwsft.datasets.text.chat import ChatEncoder
from iwsft.datasets.text.rows import read
from iwsft.datasets.text.tokens import tokenize
from iwsft.language.batches import EpochBatches, TrajectoryDataset, collate
from iwsft.objective import ImportanceWeightedMLE
from iwsft.policies import GaussianPolicy
from iwsft.presets import ImportanceWeights
from iwsft.proposals import reweight
from iwsft.reference import annotate_reference
from iwsft.samplers import StepSampler
from tests.datasets.text.chat_tokenizers import LINES, byte_level

# Where the steps grow, the number of trajectories; where those grow, the steps of each.
_TRAJECTORIES, _STEPS = 100, 10
# Single steps of a batch, as in the paper's runs with cached weights; rows of a batch of text.
_BATCH, _ROWS = 1024, 16
# Words of a prompt and of an answer.
_WORDS = (10, 20)
# Smaller peaks are the allocator's.
_LEAST_MB = 1.0


@dataclass(frozen=True)
class Sizes:
    """Sizes of the data along each axis."""

    steps: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    trajectories: tuple[int, ...] = (100, 1_000, 10_000, 100_000)
    rows: tuple[int, ...] = (1_000, 10_000, 100_000)
    turns: tuple[int, ...] = (10, 40, 160, 640)


SIZES = {
    "small": Sizes((1_000, 2_000), (10, 20), (10, 20), (2, 4)),
    "paper": Sizes(),
    "large": replace(Sizes(), steps=(*Sizes.steps, 10**7), rows=(*Sizes.rows, 10**6)),
}


@dataclass(frozen=True)
class Growth:
    """Slopes of a stage's log time and log memory over log size; memory below a MB has none."""

    stage: str
    of: str
    seconds: float
    mb: float | None


def measure(options: Options) -> Iterator[Cost]:
    """Yield the cost of each stage at each size, the stages of control first, then of text."""
    if options.dataset is not None:
        raise ValueError("scaling is measured on synthetic data; leave --dataset out")
    if options.scale != "small":
        # The first call of a stage costs more.
        list(_costs(SIZES["small"], options))
    yield from _costs(SIZES[options.scale], options)


def _costs(sizes: Sizes, options: Options) -> Iterator[Cost]:
    for steps in sizes.steps:
        yield from _control("steps", steps, _TRAJECTORIES, steps // _TRAJECTORIES, options)
    for count in sizes.trajectories:
        yield from _control("trajectories", count, count, _STEPS, options)
    for rows in sizes.rows:
        yield from _text(rows, options)
    for turns in sizes.turns:
        yield from _chat(turns, options)


def _control(of: str, size: int, count: int, steps: int, options: Options) -> Iterator[Cost]:
    """Curation, reference, sync of cached weights, sampler and update of iw-SFT(Q)."""
    cost = partial(measured, size=size, of=of, repeats=options.repeats)
    whole = control.cheetah_like(None, count, steps, options.seed)
    row, curated = cost("curation", run=lambda: curate(whole, cuts=QUALITY_BINS))
    yield row
    torch.manual_seed(options.seed)
    policies = [GaussianPolicy(*widths(curated)) for _ in range(2)]
    yield cost("reference", run=lambda: annotate_reference(policies[0], curated))[0]
    weights = ImportanceWeights.paper_control(control.K)
    loss = ImportanceWeightedMLE(policies[1], importance_weights=weights, proposal="cached")
    yield cost("sync", run=lambda: reweight(curated, loss))[0]
    row, sampler = cost("sampler", run=lambda: StepSampler(curated, _BATCH, seed=options.seed))
    yield row
    yield cost("update", run=control.Training(loss, sampler).step)[0]


def _text(size: int, options: Options) -> Iterator[Cost]:
    """Reading a file of prompts and completions, tokenising it, and the batches of an epoch."""
    cost = partial(measured, size=size, of="rows", repeats=options.repeats)
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        with path.open("w") as file:
            for _ in range(size):
                prompt, answer = _texts(draw)
                file.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")
        row, rows = cost("reading", run=lambda: read(path))
        yield row
    row, tokens = cost("tokenising", run=lambda: tokenize(rows, byte_level()).trajectories)
    yield row

    def epoch() -> None:
        dataset = TrajectoryDataset(tokens)
        for entries in EpochBatches(dataset.sizes, batch_size=_ROWS, seed=options.seed):
            collate(dataset.__getitems__(entries))

    yield cost("batching", run=epoch)[0]


def _chat(size: int, options: Options) -> Iterator[Cost]:
    """Encoding a conversation, and the tokenizer alone on its text."""
    cost = partial(measured, size=size, of="turns", repeats=options.repeats)
    draw = random.Random(options.seed)
    messages = [
        {"role": role, "content": text}
        for _ in range(size // 2)
        for role, text in zip(("user", "assistant"), _texts(draw), strict=True)
    ]
    tokenizer = byte_level()
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    yield cost("tokenizer alone", run=lambda: tokenizer(text, add_special_tokens=False))[0]
    encoder = ChatEncoder(tokenizer)
    yield cost("chat encoding", run=lambda: encoder.encode(messages))[0]


def _texts(draw: random.Random) -> tuple[str, ...]:
    words = " ".join(LINES).split()
    return tuple(" ".join(draw.choices(words, k=count)) for count in _WORDS)


def growth(costs: Sequence[Cost]) -> list[Growth]:
    """Return the slopes of each stage, in the order of the stages."""
    slopes = []
    for (stage, of), group in _stages(costs).items():
        pairs = [(cost.size, cost.mb) for cost in group if cost.mb and cost.mb >= _LEAST_MB]
        mb = slope(*zip(*pairs, strict=True)) if len(pairs) > 1 else None
        seconds = slope([cost.size for cost in group], [cost.seconds for cost in group])
        slopes.append(Growth(stage, of, seconds, mb))
    return slopes


def _stages(costs: Sequence[Cost]) -> dict[tuple[str, str], list[Cost]]:
    stages: dict[tuple[str, str], list[Cost]] = {}
    for cost in costs:
        stages.setdefault((cost.stage, cost.of), []).append(cost)
    return stages


def table(costs: Sequence[Cost]) -> Table:
    """Return the cost of each stage at its largest size, and the slopes, for a terminal."""
    out = Table("stage", caption="slope 1: the cost grows as the data")
    for heading in ("largest size", "CPU s", "slope", "MB", "slope"):
        out.add_column(heading, justify="right", no_wrap=True)
    for each, group in zip(growth(costs), _stages(costs).values(), strict=True):
        last = group[-1]
        memory = "-" if last.mb is None else f"{last.mb:.1f}"
        of_memory = "-" if each.mb is None else f"{each.mb:.2f}"
        time = f"{last.seconds:.4g}", f"{each.seconds:.2f}"
        out.add_row(each.stage, f"{last.size:,} {each.of}", *time, memory, of_memory)
    return out


def plot(costs: Sequence[Cost]) -> Figure:
    """Return time and memory over size on logarithmic axes, a column for each kind of size."""
    units = list(dict.fromkeys(cost.of for cost in costs))
    colour = {stage: colormaps["tab20"](i) for i, stage in enumerate({c.stage: 0 for c in costs})}
    with rc_context(figures.STYLE):
        figure = Figure(figsize=(3 * len(units), 5.5), layout="constrained")
        grid = figure.subplots(2, len(units), squeeze=False, sharex="col", sharey="row")
    for each, group in zip(growth(costs), _stages(costs).values(), strict=True):
        sizes = [cost.size for cost in group]
        for row, name in enumerate(("seconds", "mb")):
            ax, of = grid[row, units.index(each.of)], getattr(each, name)
            # Without a slope there is no line.
            values = [getattr(cost, name) if of is not None else math.nan for cost in group]
            label = None if of is None else f"{each.stage}: {of:.2f}"
            ax.plot(sizes, values, "o-", ms=3, lw=1.2, color=colour[each.stage], label=label)
    grid[0, 0].set_ylabel("CPU seconds; slope behind each stage")
    grid[1, 0].set_ylabel("MB above the data")
    for ax, unit in zip(grid[1], units, strict=True):
        ax.set_xlabel(unit)
    for ax in grid.flat:
        figures.scale_log(ax, "x")
        figures.scale_log(ax, "y")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=6.5, labelcolor=INK, frameon=False)
    return figure
