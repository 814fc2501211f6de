"""Small packed datasets of transitions, built from a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from baselines import Learner
from iwsft.training import Sampler
from iwsft.trajectory import from_steps

OBSERVATION_DIM, ACTION_DIM = 3, 2
LENGTHS = (5, 1, 9, 3, 6, 4)
MakeTrajectories = Callable[..., TensorDict]


@pytest.fixture(scope="session")
def make_trajectories() -> MakeTrajectories:
    """``make_trajectories(lengths, seed=0)``: every other episode is truncated, from the second on.

    The next observation is that of the next step, and at an episode's end one of its own.
    """

    def make(
        lengths: Sequence[int] = LENGTHS, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> TensorDict:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype)

        sizes = torch.tensor(lengths)
        n, last = int(sizes.sum()), sizes.cumsum(0) - 1
        observation, following = normal(n, OBSERVATION_DIM), normal(n, OBSERVATION_DIM)
        inside = torch.ones(n, dtype=torch.bool)
        inside[last] = False
        following[inside] = observation[inside.nonzero().squeeze(-1) + 1]
        terminated = torch.zeros(n, 1, dtype=torch.bool)
        truncated = torch.zeros(n, 1, dtype=torch.bool)
        terminated[last[0::2]] = True
        truncated[last[1::2]] = True
        return from_steps(
            {
                "observation": observation,
                "action": 2 * torch.rand(n, ACTION_DIM, generator=generator, dtype=dtype) - 1,
                ("next", "observation"): following,
                ("next", "reward"): normal(n, 1),
                ("next", "done"): terminated | truncated,
                ("next", "terminated"): terminated,
                ("next", "truncated"): truncated,
            },
            torch.arange(len(lengths)).repeat_interleave(sizes),
        )

    return make


@pytest.fixture
def trajectories(make_trajectories: MakeTrajectories) -> TensorDict:
    """28 steps of 6 episodes, 3 of them truncated."""
    return make_trajectories()


@pytest.fixture
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class _Recorded:
    def __init__(self, batches: list[TensorDictBase]) -> None:
        self.left = list(batches)

    def sample(self) -> TensorDictBase:
        return self.left.pop(0)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError


@pytest.fixture(scope="session")
def recorded() -> Callable[[list[TensorDictBase]], Sampler]:
    """``recorded(batches)``: a sampler that hands them out, one after the other."""
    return _Recorded


@pytest.fixture(scope="session")
def run_until() -> Callable[[Learner, Path, int | None], Learner]:
    """``run_until(learner, folder, stop)``: train, as if killed while row ``stop`` is written."""

    def run(learner: Learner, folder: Path, stop: int | None) -> Learner:
        def report(row: dict[str, float]) -> None:
            if row["step"] == stop:
                raise KeyboardInterrupt

        learner.fit(folder=folder, checkpoint_every=1, log_every=1, report=report)
        return learner

    return run
