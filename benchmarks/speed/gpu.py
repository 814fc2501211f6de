"""Speed on a GPU: updates as CUDA graphs and of stacked seeds, then language in bfloat16."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

import iwsft
from baselines.learner import Learner
from benchmarks.d4rl import settings as paper
from benchmarks.d4rl.options import QUALITY_BINS
from benchmarks.speed import baselines, control, language
from benchmarks.speed.measure import MB, Comparison, scaled
from benchmarks.speed.options import Options
from iwsft.samplers import StepSampler
from iwsft.training import Row, Schedule, fit_stack

# Makes what one seed trains with a number of updates.
Build = Callable[[int, int], Learner]
# Sizes of Qwen2.5-0.5B and of its batches.
_QWEN2 = {"width": 896, "inner": 4864, "layers": 24, "heads": 14, "vocabulary": 151_936}
_BATCH = {"batch": 8, "length": 1024, "trained": 512}


def measure(options: Options) -> Iterator[Comparison]:
    """Yield the updates of control, the log-probs, and the updates of a decoder of 0.5B."""
    sizes = scaled(
        options,
        seeds=(5, 2),
        plain_updates=(400, 8),
        updates=(2000, 8),
        # Of IQL as a graph.
        iql_updates=(20_000, 8),
        tokens=(4096, 64),
        vocabulary=(151_669, 1024),
        hidden=(896, 32),
    )
    for name, build in builders(options).items():
        yield from updates(name, build, options, sizes)
    yield from log_probs(options, sizes)
    yield from decoder(options)


def builders(options: Options) -> dict[str, Build]:
    """What trains each algorithm, on data that are on the device."""
    sizes = control.sizes_of(options)
    data = baselines.transitions(options).to(options.device)
    copies = control.hopper_replay(sizes.copies)
    curated = iwsft.curate(copies, cuts=QUALITY_BINS, seed=options.seed).to(options.device)

    def critic(name: str, seed: int, steps: int) -> Learner:
        return baselines.learner_of(name, data, seed, sizes.batch, steps)[0]

    def weighted(seed: int, steps: int) -> Learner:
        own, row = curated.copy(), paper.FineTuning()
        updater = control.cached(own, row, row.sync_every, seed)
        loss: Any = updater.loss_module
        sampler = StepSampler(own, sizes.single_steps, seed=seed)
        return Learner(loss.actor_network, loss, sampler, Schedule(steps, row.lr), updater)

    critics = {name: partial(critic, name) for name in ("iql", "awac", "td3-bc", "cql")}
    return {"iw-SFT(Q), cached weights": weighted, **critics}


def updates(
    name: str, build: Build, options: Options, sizes: SimpleNamespace
) -> Iterator[Comparison]:
    """An update with and without a graph, and one of several seeds."""
    graph, count = torch.device(options.device).type == "cuda", sizes.seeds
    many = sizes.iql_updates if name == "iql" else sizes.updates
    plain = 1e3 * seconds_per_update(build, 1, sizes.plain_updates, graph=False)
    alone = 1e3 * seconds_per_update(build, 1, many, graph=graph)
    stacked = 1e3 * seconds_per_update(build, count, sizes.updates, graph=graph)
    what = f"{name}: update as a CUDA graph"
    if not graph:
        what = f"{name}: update on the CPU, which has no graphs"
    yield Comparison(what, alone, plain, "ms per update", "without a graph")
    what, unit = f"{name}: update of {count} stacked seeds", f"ms per update of {count} seeds"
    yield Comparison(what, stacked, count * alone, unit, f"{count} seeds one after another")
    if name == "iql":
        what, unit = "a million IQL updates", f"s, scaled from {many:,} updates"
        yield Comparison(what, 1e3 * alone, 1e3 * plain, unit, "without a graph")


def seconds_per_update(build: Build, seeds: int, steps: int, *, graph: bool) -> float:
    """Wall seconds of an update of all seeds: the median over parts of a training, after one."""
    rows: list[Row] = []
    trainings = [
        build(seed, steps).training(report=None if seed else rows.append) for seed in range(seeds)
    ]
    for outcome in fit_stack(trainings, log_every=max(2, steps // 5), graph=graph):
        if isinstance(outcome, FloatingPointError):
            raise outcome
    # The first part has warm-up and capture. Each row waits for the device.
    return median(
        (b["wall_seconds"] - a["wall_seconds"]) / (b["step"] - a["step"])
        for a, b in pairwise(rows[1:])
    )


def log_probs(options: Options, sizes: SimpleNamespace) -> Iterator[Comparison]:
    """Time and peak memory of log-probs in bfloat16, against full logits and TRL's fused head."""
    shape = {name: vars(sizes)[name] for name in ("tokens", "vocabulary", "hidden")}
    ways = language.ways(options.seed, shape, options.device, torch.bfloat16)
    what = f"log-prob and gradient, bfloat16, {sizes.tokens:,} x {shape['vocabulary']:,}"
    ours, *peers = (_cost(way, options) for way in ways.values())
    for peer_name, peer in zip((language.PLAIN, "TRL's fused head"), peers, strict=True):
        yield Comparison(what, 1e3 * ours[0], 1e3 * peer[0], "ms per batch", peer_name)
        if options.device != "cpu":
            yield Comparison(f"peak memory of {what}", ours[1], peer[1], "MB", peer_name)


def _cost(way: Callable[[], object], options: Options) -> tuple[float, float]:
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

    sizes, model = rows.sizes_of(options), "tiny decoder"
    if options.scale == "paper":
        vars(sizes).update(_QWEN2 | _BATCH)
        model = "decoder of 0.5B"
    shape = f"{model}, {sizes.batch} x {sizes.length} tokens, {sizes.trained} trained"

    def seconds_per_token(settings: rows.Settings) -> float:
        run = rows.TimedRun(settings, options, sizes, options.device)
        run.now = _now
        run()
        taken = median(run() for _ in range(options.repeats))
        del run
        gc.collect()
        return taken / (sizes.updates * sizes.batch * sizes.length)

    sft = seconds_per_token(rows.SFT)
    for name, settings, peer_name in (
        ("SFT", rows.TRL, "TRL's SFTTrainer"),
        ("iw-SFT, q = theta", {"proposal": "current"}, "our SFT"),
        ("iw-SFT, hard sync", {"proposal": "cached"}, "our SFT"),
        ("iw-SFT, EMA", {"proposal": "lagged", "ema_decay": 0.99}, "our SFT"),
    ):
        other = seconds_per_token(settings)
        ours, peer = (sft, other) if settings is rows.TRL else (other, sft)
        what = f"{name}, {shape}: {1 / ours:,.0f} tokens/s"
        yield Comparison(what, 1e6 * ours, 1e6 * peer, "us per token", peer_name)


def _now() -> float:
    """Seconds on the clock when the device has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
