"""Cost over size: time and memory of each stage as the data grow, and the slopes of their logs."""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

import iwsft
from benchmarks.d4rl.options import QUALITY_BINS
from benchmarks.report import figures
from benchmarks.report.document import INK, Grid, to_svg
from benchmarks.speed import control
from benchmarks.speed.measure import Cost, measured, slope
from benchmarks.speed.options import Options
from iwsft.datasets.text.chat import ChatEncoder
from iwsft.datasets.text.rows import read
from iwsft.datasets.text.tokens import tokenize
from iwsft.language.batches import EpochBatches, TrajectoryDataset, collate
from iwsft.samplers import StepSampler
from tests.datasets.text.chat_tokenizers import LINES, byte_level

# Where the steps grow, the number of trajectories; where those grow, the steps of each.
_TRAJECTORIES, _STEPS = 100, 10
# Single steps of a batch, as in the paper's runs with cached weights; rows of a batch of text.
_BATCH, _ROWS = 1024, 16
# Words of a prompt and of an answer.
_WORDS = {"prompt": 10, "completion": 20}
# Smaller peaks are the allocator's.
_LEAST_MB = 1.0


# Measures a stage by its name; gives its cost and its result.
Measure = Callable[[str, Callable[[], Any]], tuple[Cost, Any]]
# Sizes of the data along each axis.
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "small": {"steps": (10**3, 2000), "trajectories": (10, 20), "rows": (10, 20), "turns": (2, 4)},
    "paper": {
        "steps": (10**4, 10**5, 10**6),
        "trajectories": (10**2, 10**3, 10**4, 10**5),
        "rows": (10**3, 10**4, 10**5),
        "turns": (10, 40, 160, 640),
    },
    # Beyond those of the paper.
    "large": {"steps": (10**7,), "rows": (10**6,)},
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
    sizes = SIZES["small" if options.scale == "small" else "paper"]
    if options.scale != "small":
        # The first call of a stage costs more.
        list(measure(replace(options, scale="small")))
    for of, some in sizes.items():
        further = SIZES["large"].get(of, ()) if options.scale == "large" else ()
        for size in (*some, *further):
            cost = partial(measured, size=size, of=of, repeats=options.repeats)
            yield from _STAGES[of](size, cost, options)


def _control(count: int, steps: int, cost: Measure, options: Options) -> Iterator[Cost]:
    """Curation, reference, sync of cached weights, sampler and update of iw-SFT(Q)."""
    whole = control.cheetah_like(options, count, steps)
    row, curated = cost("curation", lambda: iwsft.curate(whole, cuts=QUALITY_BINS))
    yield row
    reference, policy = control.policies(curated, options.seed)
    yield cost("reference", lambda: iwsft.annotate_reference(reference, curated))[0]
    weights = iwsft.ImportanceWeights.paper_control(control.K)
    loss = iwsft.ImportanceWeightedMLE(policy, importance_weights=weights, proposal="cached")
    yield cost("sync", lambda: iwsft.reweight(curated, loss))[0]
    row, sampler = cost("sampler", lambda: StepSampler(curated, _BATCH, seed=options.seed))
    yield row
    yield cost("update", control.updates(loss, sampler))[0]


def _rows(size: int, cost: Measure, options: Options) -> Iterator[Cost]:
    """Reading a file of prompts and completions, tokenising it, and the batches of an epoch."""
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        with path.open("w") as file:
            for _ in range(size):
                file.write(json.dumps(_texts(draw)) + "\n")
        row, rows = cost("reading", lambda: read(path))
        yield row
    row, tokens = cost("tokenising", lambda: tokenize(rows, byte_level()).trajectories)
    yield row

    def epoch() -> None:
        dataset = TrajectoryDataset(tokens)
        for entries in EpochBatches(dataset.sizes, batch_size=_ROWS, seed=options.seed):
            collate(dataset.__getitems__(entries))

    yield cost("batching", epoch)[0]


def _turns(size: int, cost: Measure, options: Options) -> Iterator[Cost]:
    """Encoding a conversation, and the tokenizer alone on its text."""
    draw = random.Random(options.seed)
    messages = [
        {"role": role, "content": text}
        for _ in range(size // 2)
        for role, text in zip(("user", "assistant"), _texts(draw).values(), strict=True)
    ]
    tokenizer = byte_level()
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    yield cost("tokenizer alone", lambda: tokenizer(text, add_special_tokens=False))[0]
    encoder = ChatEncoder(tokenizer)
    yield cost("chat encoding", lambda: encoder.encode(messages))[0]


def _texts(draw: random.Random) -> dict[str, str]:
    words = " ".join(LINES).split()
    return {name: " ".join(draw.choices(words, k=count)) for name, count in _WORDS.items()}


_STAGES: dict[str, Callable[[int, Measure, Options], Iterator[Cost]]] = {
    "steps": lambda size, *rest: _control(_TRAJECTORIES, size // _TRAJECTORIES, *rest),
    "trajectories": lambda size, *rest: _control(size, _STEPS, *rest),
    "rows": _rows,
    "turns": _turns,
}


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


def table(costs: Sequence[Cost], _checks: object) -> Grid:
    """Return the cost of each stage at its largest size, and the slopes, for a terminal."""
    out = Grid(["data", "stage", "CPU s", "slope", "MB", "slope of MB"])
    for each, group in zip(growth(costs), _stages(costs).values(), strict=True):
        last = group[-1]
        memory = ["-" if x is None else f"{x:.3g}" for x in (last.mb, each.mb)]
        time = f"{last.seconds:.4g}", f"{each.seconds:.2f}"
        out.rows.append([f"{last.size:,} {each.of}", each.stage, *time, *memory])
    return out


def plot(costs: Sequence[Cost]) -> bytes:
    """Return an SVG of time and memory over size on logarithmic axes, a column for each axis."""
    units = list(dict.fromkeys(cost.of for cost in costs))
    colour = {stage: colormaps["tab20"](i) for i, stage in enumerate({c.stage: 0 for c in costs})}
    with rc_context(figures.STYLE):
        figure = Figure(figsize=(3 * len(units), 5.5), layout="constrained")
        grid = figure.subplots(2, len(units), squeeze=False, sharex="col", sharey="row")
    for each, group in zip(growth(costs), _stages(costs).values(), strict=True):
        for row, name in enumerate(("seconds", "mb")):
            of = getattr(each, name)
            # Without a slope there is no line.
            values = [getattr(cost, name) if of is not None else math.nan for cost in group]
            label = None if of is None else f"{each.stage}: {of:.2f}"
            style: dict[str, Any] = {"color": colour[each.stage], "ms": 3, "lw": 1.2}
            ax = grid[row, units.index(each.of)]
            ax.plot([cost.size for cost in group], values, "o-", label=label, **style)
    grid[0, 0].set_ylabel("CPU seconds; slope behind each stage")
    grid[1, 0].set_ylabel("MB above the data")
    for ax, unit in zip(grid[1], units, strict=True):
        ax.set_xlabel(unit)
    for ax in grid.flat:
        figures.scale_log(ax, "x")
        figures.scale_log(ax, "y")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=6.5, labelcolor=INK, frameon=False)
    return to_svg(figure)
