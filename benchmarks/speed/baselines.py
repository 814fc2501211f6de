"""Speed of the baselines: an update of each against plain torch, on HalfCheetah's sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from baselines import algorithm
from baselines.learner import Learner
from benchmarks.speed import control
from benchmarks.speed.measure import Check, Comparison, paired
from benchmarks.speed.options import Options
from iwsft.training import fit
from iwsft.trajectory import DONE, NEXT_OBSERVATION, OBSERVATION, TERMINATED, TRAJ_IDS, TRUNCATED
from tests.oracles.critics import PLAIN
from tests.oracles.networks import PlainLearner, disagreement

# Largest difference of a parameter after the checked updates in float64. It is rounding, which
# Adam divides by gradients close to 0.
PARAMETER_LIMIT = 1e-6
# Updates after which the two ways are compared; TD3+BC's actor moves at every second.
_CHECKED = 4


@dataclass(frozen=True)
class Sizes:
    """Size of the synthetic dataset, of an update and of a repeat."""

    trajectories: int = 202
    steps: int = 1000
    batch_size: int = 256
    updates: int = 20
    # Repeats for each that the options ask for, so short that both ways see the same machine.
    blocks: int = 5


SIZES = {
    "paper": Sizes(),
    "small": Sizes(trajectories=20, steps=50, batch_size=16, updates=2, blocks=1),
}


def measure(options: Options) -> Iterator[Comparison | Check]:
    """Yield a row for each algorithm, then behaviour cloning with 3 x 256."""
    sizes = SIZES[options.scale]
    trajectories = transitions(options, sizes)
    for name, plain in PLAIN.items():
        yield from updates(name, plain, trajectories, sizes, options)
    yield from control.behaviour_cloning(options, control.SIZES[options.scale])


def updates(
    name: str,
    plain: Callable[[Learner, Any], PlainLearner],
    trajectories: TensorDictBase,
    sizes: Sizes,
    options: Options,
) -> Iterator[Comparison | Check]:
    """An update as :func:`iwsft.training.fit` makes it: batch, loss, Adam, targets."""
    module = algorithm(name)
    settings = module.published("halfcheetah-medium-replay-v2")[0]
    settings = replace(settings, batch_size=sizes.batch_size)

    def ways(
        steps: int, trajectories: TensorDictBase
    ) -> tuple[Callable[[], object], Callable[[], None], Callable[[], float]]:
        """Return both ways to make ``steps`` updates, and how far their parameters are apart."""
        shortened = replace(settings, steps=steps)
        learner, other = (
            module.build(trajectories, shortened, seed=options.seed) for _ in range(2)
        )
        peer = plain(other, shortened)

        parts = learner.loss, learner.sampler, learner.schedule
        ours = partial(fit, *parts, updater=learner.updater, log_every=steps)

        def theirs() -> None:
            for _ in range(steps):
                peer.update(other.sampler.sample())

        return ours, theirs, lambda: disagreement(peer.networks, learner.loss)

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
    ours()
    theirs()
    yield paired(ours, theirs, sizes.blocks * options.repeats).row(
        f"{name} update, batch {sizes.batch_size}",
        f"{name} with default Adam (plain torch)",
        "ms",
        "per update",
        per=sizes.updates,
    )


def transitions(options: Options, sizes: Sizes) -> TensorDict:
    """Return the file's transitions, or HalfCheetah's shape with every episode truncated."""
    out = control.cheetah_like(options.dataset, sizes.trajectories, sizes.steps, options.seed)
    if options.dataset is not None:
        return out
    ids = out.get(TRAJ_IDS)
    ends = torch.ones(len(ids), 1, dtype=torch.bool)
    ends[:-1, 0] = ids[1:] != ids[:-1]
    out.set(NEXT_OBSERVATION, out.get(OBSERVATION).roll(-1, 0))
    out.set(DONE, ends)
    out.set(TRUNCATED, ends)
    out.set(TERMINATED, torch.zeros_like(ends))
    return out
