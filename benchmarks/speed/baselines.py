"""Speed of the baselines: an update of each against plain torch, on HalfCheetah's sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from baselines import algorithm
from baselines.learner import Learner
from benchmarks.speed import control
from benchmarks.speed.measure import Check, Comparison, Way, compare
from benchmarks.speed.options import Options
from iwsft.trajectory import DONE, NEXT_OBSERVATION, OBSERVATION, TERMINATED, TRAJ_IDS, TRUNCATED
from tests.oracles.critics import PLAIN
from tests.oracles.networks import PlainLearner, disagreement

# Largest difference of a parameter after the checked updates in float64. It is rounding, which
# Adam divides by gradients close to 0.
PARAMETER_LIMIT = 1e-6
# Updates after which the two ways are compared; TD3+BC's actor moves at every second.
_CHECKED = 4


def measure(options: Options) -> Iterator[Comparison | Check]:
    """Yield a row for each algorithm, then behaviour cloning with 3 x 256."""
    for name, plain in PLAIN.items():
        yield from updates(name, plain, options)
    yield from control.behaviour_cloning(options)


def updates(
    name: str, plain: Callable[[Learner, Any], PlainLearner], options: Options
) -> Iterator[Comparison | Check]:
    """An update as :func:`iwsft.training.fit` makes it: batch, loss, Adam, targets."""
    trajectories, sizes = transitions(options), control.sizes_of(options)

    def ways(steps: int, data: TensorDictBase) -> tuple[Way, Way, Callable[[], float]]:
        """Return both ways to make ``steps`` updates, and how far their parameters are apart."""
        learner, other = (learner_of(name, data, options.seed, sizes.batch, steps) for _ in "ab")
        peer = plain(*other)

        def theirs() -> None:
            for _ in range(steps):
                peer.update(other[0].sampler.sample())

        ours = partial(learner[0].fit, log_every=steps)
        return ours, theirs, lambda: disagreement(peer.networks, learner[0].loss)

    # In float32 rounding may switch a ReLU unit, and Adam makes a whole step of the difference.
    torch.set_default_dtype(torch.float64)
    try:
        exact = trajectories.apply(lambda x: x.double() if x.is_floating_point() else x)
        ours, theirs, difference = ways(_CHECKED, exact)
        for way in (ours, theirs):
            torch.manual_seed(options.seed)
            way()
    finally:
        torch.set_default_dtype(torch.float32)
    what = f"{name}: float64 parameters after {_CHECKED} updates against the plain ones"
    yield Check(what, difference(), PARAMETER_LIMIT)
    ours, theirs, _ = ways(sizes.updates, trajectories)
    peer_name, unit = f"{name} with default Adam (plain torch)", "ms per update"
    name = f"{name} update, batch {sizes.batch}"
    repeats = 5 * options.repeats
    yield compare(name, ours, theirs, peer_name, unit, repeats, per=sizes.updates)


def learner_of(
    name: str, data: TensorDictBase, seed: int, batch: int, steps: int
) -> tuple[Learner, Any]:
    """Return a baseline with HalfCheetah's published settings, and those settings."""
    module = algorithm(name)
    published = module.published("halfcheetah-medium-replay-v2")[0]
    settings = replace(published, batch_size=batch, steps=steps)
    return module.build(data, settings, seed=seed), settings


def transitions(options: Options) -> TensorDict:
    """Return transitions of HalfCheetah's shape, with every episode truncated."""
    out = control.cheetah_like(options)
    ids = out.get(TRAJ_IDS)
    ends = torch.ones(len(ids), 1, dtype=torch.bool)
    ends[:-1, 0] = ids[1:] != ids[:-1]
    out.set(NEXT_OBSERVATION, out.get(OBSERVATION).roll(-1, 0))
    for key, value in ((DONE, ends), (TRUNCATED, ends), (TERMINATED, torch.zeros_like(ends))):
        out.set(key, value)
    return out
