"""Speed on a GPU: updates as CUDA graphs and of stacked seeds, then language in bfloat16."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from baselines import algorithm
from baselines.learner import Learner
from benchmarks.d4rl import settings as paper
from benchmarks.d4rl.options import QUALITY_BINS
from benchmarks.d4rl.run import sizes as widths
from benchmarks.speed import baselines, control, language
from benchmarks.speed.measure import MB, Check, Comparison
from benchmarks.speed.options import Options
from iwsft.curation import curate
from iwsft.objective import ImportanceWeightedMLE
from iwsft.policies import GaussianPolicy
from iwsft.proposals import HardSync
from iwsft.reference import annotate_reference
from iwsft.samplers import StepSampler
from iwsft.training import Row, Schedule, Training, fit_stack

_ROW = paper.FineTuning()
# Makes what one seed trains with a number of updates.
Build = Callable[[int, int], Learner]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measured updates; IQL takes ``iql_updates`` as a graph."""

    seeds: int = 5
    plain_updates: int = 400
    updates: int = 2000
    iql_updates: int = 20_000
    batch: int = 256
    single_steps: int = 1024
    tokens: int = 4096
    hidden: int = 896


SIZES = {
    "paper": Sizes(),
    "small": Sizes(
        seeds=2,
        plain_updates=8,
        updates=8,
        iql_updates=8,
        batch=16,
        single_steps=16,
        tokens=64,
        hidden=32,
    ),
}
# Sizes of Qwen2.5-0.5B.
_QWEN2 = {"width": 896, "inner": 4864, "layers": 24, "heads": 14, "vocabulary": 151_936}
_BATCH = {"batch": 8, "length": 1024, "trained": 512}


def measure(options: Options) -> Iterator[Comparison | Check]:
    """Yield the updates of control, the log-probs, and the updates of a decoder of 0.5B."""
    if options.dataset is not None:
        raise ValueError("gpu is measured on synthetic data; leave --dataset out")
    sizes = SIZES[options.scale]
    for name, build in builders(options, sizes).items():
        yield from updates(name, build, options, sizes)
    yield from log_probs(options, sizes)
    yield from decoder(options)


def builders(options: Options, sizes: Sizes) -> dict[str, Build]:
    """What trains each algorithm, on data that are on the device."""
    shape = baselines.SIZES[options.scale]
    transitions = baselines.transitions(options, shape).to(options.device)
    copies = control.SIZES[options.scale].copies
    curated = curate(control.hopper_replay(copies), cuts=QUALITY_BINS, seed=options.seed)

    def critic(name: str) -> Build:
        module = algorithm(name)
        settings = module.published("halfcheetah-medium-replay-v2")[0]

        def build(seed: int, steps: int) -> Learner:
            given = replace(settings, batch_size=sizes.batch, steps=steps)
            return module.build(transitions, given, seed=seed)

        return build

    def weighted(seed: int, steps: int) -> Learner:
        data = curated.copy().to(options.device)
        torch.manual_seed(seed)
        reference, policy = (GaussianPolicy(*widths(data)).to(options.device) for _ in range(2))
        annotate_reference(reference, data)
        chain = paper.choose_weights("paper", _ROW)
        loss = ImportanceWeightedMLE(policy, importance_weights=chain, proposal="cached")
        updater = HardSync(loss, every=_ROW.sync_every, trajectories=data)
        sampler = StepSampler(data, sizes.single_steps, seed=seed)
        return Learner(policy, loss, sampler, Schedule(steps, _ROW.lr), updater)

    names = ("iql", "awac", "td3-bc", "cql")
    return {"iw-SFT(Q), cached weights": weighted} | {name: critic(name) for name in names}


def updates(name: str, build: Build, options: Options, sizes: Sizes) -> Iterator[Comparison]:
    """An update with and without a graph, and one of several seeds."""
    graph, count = torch.device(options.device).type == "cuda", sizes.seeds
    many = sizes.iql_updates if name == "iql" else sizes.updates
    plain = seconds_per_update(build, 1, sizes.plain_updates, graph=False)
    alone = seconds_per_update(build, 1, many, graph=graph)
    stacked = seconds_per_update(build, count, sizes.updates, graph=graph)
    each, together = ("ms per update", f"ms per update of {count} seeds")
    how = "as a CUDA graph" if graph else "on the CPU, which has no graphs"
    yield Comparison(f"{name}: update {how}", 1e3 * alone, 1e3 * plain, each, "without a graph")
    yield Comparison(
        f"{name}: update of {count} stacked seeds",
        1e3 * stacked,
        1e3 * count * alone,
        together,
        f"{count} seeds one after another",
    )
    if name == "iql":
        unit = f"s, scaled from {many:,} updates"
        yield Comparison("a million IQL updates", 1e6 * alone, 1e6 * plain, unit, "without a graph")


def seconds_per_update(build: Build, seeds: int, steps: int, *, graph: bool) -> float:
    """Wall seconds of an update of all seeds: the median over parts of a training, after one."""
    rows: list[Row] = []
    trainings = []
    for seed in range(seeds):
        learner = build(seed, steps)
        parts: dict[str, Any] = {"updater": learner.updater, "limits": learner.limits}
        report = rows.append if seed == 0 else None
        trainings.append(
            Training(learner.loss, learner.sampler, learner.schedule, report=report, **parts)
        )
    for outcome in fit_stack(trainings, log_every=max(2, steps // 5), graph=graph):
        if isinstance(outcome, FloatingPointError):
            raise outcome
    # The first part has warm-up and capture. Each row waits for the device.
    parts_of_rows = list(pairwise(rows[1:]))
    return median(
        (b["wall_seconds"] - a["wall_seconds"]) / (b["step"] - a["step"]) for a, b in parts_of_rows
    )


class DeviceLogProbs(language.LogProbs):
    """Log-probs and their gradients in bfloat16 on a device, also by TRL's fused head."""

    def __init__(self, device: str, **shape: int) -> None:
        super().__init__(**shape)
        for name in ("hidden", "weight"):
            value = getattr(self, name).detach().to(device, torch.bfloat16)
            setattr(self, name, value.requires_grad_())
        self.target, self.upstream = self.target.to(device), self.upstream.to(device)

    def fused(self) -> None:
        """Compute loss and gradient with the head of TRL's trainers."""
        from trl.kernels import ChunkedLogProbFunction

        settings = (1.0, 32_768, None, 1.0, ("log_probs",))
        inputs = (self.hidden, self.weight, None, self.target)
        self._backward(ChunkedLogProbFunction.apply(*inputs, *settings)[0])


def log_probs(options: Options, sizes: Sizes) -> Iterator[Comparison]:
    """Time and peak memory of log-probs in bfloat16, against full logits and TRL's fused head."""
    shape = {"tokens": sizes.tokens, "hidden": sizes.hidden}
    shape["vocabulary"] = language.SIZES[options.scale].vocabulary
    pair = DeviceLogProbs(options.device, seed=options.seed, **shape)
    what = f"log-prob and gradient, bfloat16, {sizes.tokens:,} x {shape['vocabulary']:,}"
    ours = _cost(pair.ours, options)
    for peer_name, way in (
        ("full logits, log_softmax, gather (plain torch)", pair.plain),
        ("TRL's fused head", pair.fused),
    ):
        peer = _cost(way, options)
        yield Comparison(what, 1e3 * ours[0], 1e3 * peer[0], "ms per batch", peer_name)
        if options.device != "cpu":
            yield Comparison(f"peak memory of {what}", ours[1], peer[1], "MB", peer_name)


def _cost(way: Callable[[], None], options: Options) -> tuple[float, float]:
    """Wall seconds of a call, and the MB by which it raises the memory of the device."""
    way()
    seconds = []
    on_gpu, before = options.device != "cpu", 0
    if on_gpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3 * options.repeats):
        start = _now()
        way()
        seconds.append(_now() - start)
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return median(seconds), peak / MB


def decoder(options: Options) -> Iterator[Comparison]:
    """Updates of a decoder like Qwen2.5-0.5B, made from its config: SFT, TRL's, weighted ones."""
    # Imported here, because control needs neither transformers nor TRL.
    from benchmarks.speed import language_updates as rows

    sizes = rows.SIZES[options.scale]
    if options.scale == "paper":
        sizes = replace(sizes, **_QWEN2, **_BATCH)
    ways: dict[str, dict[str, Any] | None] = {
        "SFT": rows.SFT,
        "TRL's SFTTrainer": rows.TRL,
        "iw-SFT, q = theta": {"proposal": "current"},
        "iw-SFT, hard sync": {"proposal": "cached"},
        "iw-SFT, EMA": {"proposal": "lagged", "ema_decay": 0.99},
    }
    tokens = sizes.updates * sizes.batch * sizes.length
    taken: dict[str, float] = {}
    for name, settings in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            trainer = rows.build_trainer(
                Path(folder), settings, options.seed, sizes, device=options.device
            )
            run = rows.TimedRun(trainer, sizes.updates, now=_now)
            run()
            taken[name] = median(run() for _ in range(options.repeats)) / tokens
            del trainer, run
        gc.collect()
    shape = f"{sizes.batch} x {sizes.length} tokens, {sizes.trained} trained"
    model = "decoder of 0.5B" if options.scale == "paper" else "tiny decoder"
    sft = taken.pop("SFT")
    others = {"SFT": (sft, taken.pop("TRL's SFTTrainer"), "TRL's SFTTrainer")}
    others |= {name: (seconds, sft, "our SFT") for name, seconds in taken.items()}
    for name, (ours, peer, peer_name) in others.items():
        what = f"{name}, {model}, {shape}: {1 / ours:,.0f} tokens/s"
        yield Comparison(what, 1e6 * ours, 1e6 * peer, "us per token", peer_name)


def _now() -> float:
    """Seconds on the clock when the device has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
