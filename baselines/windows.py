"""Windows of consecutive steps with their returns-to-go: batches of a sequence model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from iwsft.samplers import TransitionSampler, check_same_settings
from iwsft.trajectory import (
    ACTION,
    DONE,
    MASK,
    MULTIPLICITY,
    OBSERVATION,
    REWARD,
    TRAJ_IDS,
    Segments,
    lengths,
)

RETURN_TO_GO: NestedKey = "return_to_go"
_STEP = "step"


def returns_to_go(trajectories: TensorDictBase) -> Tensor:
    """Return the sum of rewards from each step to the end of its trajectory, sum_{u >= t} r_u.

    A trajectory that was cut off, for example at a time limit, counts as ending there.
    Trajectories are packed; the result is float32 ``[N, 1]``, added up in float64.
    """
    index = Segments.of(trajectories).index
    rewards = trajectories.get(REWARD).squeeze(-1).double()
    until = rewards.cumsum(0)
    last = lengths(trajectories).cumsum(0) - 1
    return (until[last[index]] - until + rewards).float().unsqueeze(-1)


class WindowSampler:
    """Sampler of windows of ``context`` consecutive steps of one trajectory.

    A trajectory is drawn in proportion to its length (times its ``multiplicity``, where there is
    one), then the first step of the window, uniformly. So every step is equally likely to be the
    first (the procedure of Chen et al. 2021). A window that reaches past the end of its trajectory
    is short: zeros follow its valid steps, and ``("collector", "mask")`` marks them. A causal model
    can't see them from a valid step, so they need no mask in its attention.

    Args:
        trajectories: What :func:`baselines.learner.read_steps` returns. It is read once, here.
        batch_size: Windows of a batch.
        context: K, the steps of a window.
        seed: Seed of the sampler's generator.

    Raises:
        ValueError: Steps are masked.
    """

    def __init__(
        self,
        trajectories: TensorDictBase,
        batch_size: int = 64,
        *,
        context: int = 20,
        seed: int = 0,
    ) -> None:
        segments = Segments.of(trajectories)
        device = segments.index.device
        steps = trajectories.select(TRAJ_IDS, DONE, MULTIPLICITY, strict=False)
        steps.set(_STEP, torch.arange(len(trajectories), device=device))
        self._starts = TransitionSampler(steps, batch_size, seed=seed, keys=(_STEP,))
        if not bool(segments.valid.all()):
            raise ValueError(
                "some steps are masked, a window can't skip them: drop them first, "
                "iwsft.trajectory.pack(trajectories)"
            )
        self.context = context
        self.seed = seed
        self._steps = TensorDict(
            {
                OBSERVATION: trajectories.get(OBSERVATION),
                ACTION: trajectories.get(ACTION),
                RETURN_TO_GO: returns_to_go(trajectories),
            },
            [len(trajectories)],
        )
        self._ends = lengths(trajectories).cumsum(0)[segments.index]
        self._offsets = torch.arange(context, device=device)

    def sample(self) -> TensorDictBase:
        """Draw a batch ``[batch_size, context]`` of observation, action, return-to-go and mask."""
        start = self._starts.sample().get(_STEP)
        steps = start[:, None] + self._offsets
        mask = steps < self._ends[start][:, None]
        # Past the end, any step that exists: it is zeroed below.
        flat = steps.where(mask, start[:, None]).reshape(-1)

        def take(x: Tensor) -> Tensor:
            windows = x.index_select(0, flat).reshape(*mask.shape, *x.shape[1:])
            return windows.masked_fill_(~mask[..., None], 0)

        batch = self._steps.apply(take, batch_size=mask.shape)
        return batch.set(MASK, mask)

    def state_dict(self) -> dict[str, Any]:
        """Return the state; a sampler that loads it draws the same batches next."""
        return {**self._starts.state_dict(), "context": self.context}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        A ValueError says that it is of other trajectories, or of another batch size or context.
        """
        check_same_settings(state_dict, {"context": self.context})
        self._starts.load_state_dict(state_dict)
