"""Policies that act in environments: their inputs, and one call of them for all episodes.

:func:`iwsft.evaluation.evaluate` and ``iwsft collect`` use this module, so that a policy acts the
same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tensordict import NestedKey, TensorDict, unravel_key_list
from tensordict.nn import TensorDictModuleBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from iwsft.policies.log_prob import evaluating
from iwsft.trajectory import ACTION, OBSERVATION

# A matrix product may differ in the last bit between numbers of rows, and physics amplifies that:
# with a multiple of this, an episode does not depend on the other episodes.
ROWS = 32

# A policy with a memory may read these too.
IS_INIT: NestedKey = "is_init"
PREVIOUS_REWARD: NestedKey = "reward"
READABLE = (OBSERVATION, IS_INIT, PREVIOUS_REWARD)


class PolicyInputs:
    """The inputs of a policy at a step, with a row for each parallel episode.

    A row is the same environment from step to step. The policy gets the rows without an episode
    too, as first steps. The number of rows is the next multiple of ``ROWS``.

    Attributes:
        observation: Observations, float32 ``[rows, obs]``.
        first: Whether the row is at a first step or has no episode, bool ``[rows, 1]``.
        reward: Reward of the last action, 0 at a first step, float32 ``[rows, 1]``.
    """

    def __init__(self, episodes: int, observation_dim: int) -> None:
        rows = -(-episodes // ROWS) * ROWS
        self.observation = np.zeros((rows, observation_dim), np.float32)
        self.first = np.ones((rows, 1), np.bool_)
        self.reward = np.zeros((rows, 1), np.float32)
        self._running = np.zeros(rows, np.bool_)
        self._steps = np.zeros(rows, np.int64)
        self._episodes = [""] * rows

    def begin(self, row: int, observation: ArrayLike, episode: str) -> None:
        """Start an episode in ``row``; ``episode`` is its name in errors."""
        self.end(row)
        self.observation[row] = observation
        self._running[row], self._steps[row], self._episodes[row] = True, 0, episode

    def follow(self, row: int, observation: ArrayLike, reward: float) -> None:
        """Continue the episode in ``row`` after a step with this reward."""
        self.observation[row] = observation
        self.first[row], self.reward[row] = False, reward
        self._steps[row] += 1

    def end(self, row: int) -> None:
        """End the episode in ``row``."""
        self.first[row], self.reward[row], self._running[row] = True, 0.0, False

    def check_finite(self, actions: NDArray[Any], name: str) -> None:
        """Check the actions ``[rows, act]`` of the rows that have an episode."""
        wrong = np.flatnonzero(self._running & ~np.isfinite(actions).all(axis=1))
        if wrong.size:
            row = int(wrong[0])
            at = f"at step {self._steps[row]} of {self._episodes[row]}"
            raise FloatingPointError(f"{name} gave the action {actions[row].tolist()} {at}")


def act(
    policy: TensorDictModuleBase,
    inputs: PolicyInputs,
    *,
    device: torch.device | str = "cpu",
    name: str = "the policy",
) -> NDArray[Any]:
    """Call the policy once for all rows, within :func:`acting`; errors call it ``name``.

    Its actions ``[rows, act]`` are not clipped. A FloatingPointError names the episode whose action
    is not finite.
    """
    actions = _call(policy, inputs, device)
    inputs.check_finite(actions, name)
    return actions


@contextmanager
def acting(
    policy: TensorDictModuleBase, mode: ExplorationType = ExplorationType.DETERMINISTIC
) -> Iterator[None]:
    """Act without gradients, in eval mode, and with TorchRL's exploration type ``mode``.

    By default actions are deterministic (the mean of a Gaussian); ``ExplorationType.RANDOM`` draws
    them. Each module's own mode (training or eval) is restored afterwards.
    """
    with evaluating(policy), torch.no_grad(), set_exploration_type(mode):
        yield


def check_keys(policy: TensorDictModuleBase, *, name: str = "the policy") -> None:
    """Check that a policy reads only ``READABLE`` and writes ``action``; ``name`` is its name."""
    if not isinstance(policy, TensorDictModuleBase):
        kind, keys = type(policy).__name__, f"[{OBSERVATION!r}], [{ACTION!r}]"
        way_out = f"wrap it: tensordict.nn.TensorDictModule(policy, {keys})"
        raise TypeError(f"{name} is a {kind}, and must be a TensorDictModule; {way_out}")
    missing = [key for key in unravel_key_list(list(policy.in_keys)) if key not in READABLE]
    if missing:
        raise ValueError(f"{name} reads {missing}; an environment gives only {READABLE}")
    if ACTION not in policy.out_keys:
        raise ValueError(f"{name} must write {ACTION!r}, it writes {policy.out_keys}")


def check_sizes(
    policy: TensorDictModuleBase,
    observation: NDArray[Any],
    action_shape: tuple[int, ...],
    env_id: str,
    *,
    device: torch.device | str = "cpu",
    name: str = "the policy",
) -> None:
    """Call the policy once on ``ROWS`` rows without an episode, within :func:`acting`.

    All rows get ``observation`` ``[obs]``; actions must have ``action_shape``, ``(act,)``. A
    ValueError names the environment and the policy where the call fails, or they have not.
    """
    inputs = PolicyInputs(ROWS, observation.size)
    inputs.observation[:] = observation
    try:
        actions = _call(policy, inputs, device)
    except (RuntimeError, ValueError) as error:
        on = f"{env_id}, whose observations have size {observation.size}"
        raise ValueError(f"{name} cannot act on {on}: {error}") from error
    shape = actions.shape[1:]
    if shape != action_shape:
        raise ValueError(f"{name} gives actions of shape {shape}, {env_id} takes {action_shape}")


def _call(
    policy: TensorDictModuleBase, inputs: PolicyInputs, device: torch.device | str
) -> NDArray[Any]:
    entries = {
        OBSERVATION: torch.tensor(inputs.observation, device=device),
        IS_INIT: torch.tensor(inputs.first, device=device),
        PREVIOUS_REWARD: torch.tensor(inputs.reward, device=device),
    }
    actions = policy(TensorDict(entries, [len(inputs.first)], device=device))[ACTION]
    # NumPy has no bfloat16.
    return actions.to(torch.promote_types(actions.dtype, torch.float32)).numpy(force=True)
