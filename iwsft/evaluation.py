"""Returns of a policy in gymnasium environments, and D4RL's normalised score."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from tensordict.nn import TensorDictModuleBase

from iwsft import environments
from iwsft.acting import ROWS, PolicyInputs, act, acting, check_keys, check_sizes
from iwsft.extras import named
from iwsft.policies import GaussianPolicy, MixturePolicy
from iwsft.progress import Progress
from iwsft.validation import check_count
from iwsft.video import recorded

with named():
    import gymnasium as gym

# An episode of an environment without a limit may have this many steps.
_ENDLESS = 100_000


@dataclass(frozen=True)
class Evaluation:
    """Episodes of one policy, in the order of their seeds.

    Attributes:
        returns: Undiscounted return of each episode.
        lengths: Number of steps of each episode.
        normalized_scores: D4RL score of each episode (0 random, 100 expert), or None without
            reference scores.
        successes: Whether the environment reported success at any step of each episode, or None
            where it reports no success.
        versions: Versions of the packages that decide the environment's numbers.
    """

    env_id: str
    seed: int
    returns: list[float]
    lengths: list[int]
    normalized_scores: list[float] | None
    successes: list[bool] | None
    versions: dict[str, str]
    wall_seconds: float

    @property
    def return_mean(self) -> float:
        """Mean return over the episodes."""
        return float(np.mean(self.returns))

    @property
    def score(self) -> float | None:
        """Mean D4RL score over the episodes, or None without reference scores."""
        return None if self.normalized_scores is None else float(np.mean(self.normalized_scores))

    def __str__(self) -> str:
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        parts = [
            f"{self.env_id} ({packages}), {len(self.returns)} episodes, seed {self.seed}",
            f"return {self.return_mean:.1f}",
            f"length {np.mean(self.lengths):.0f}",
        ]
        if self.score is not None:
            parts.append(f"normalised score {self.score:.1f}")
        if self.successes is not None:
            parts.append(f"success {np.mean(self.successes):.0%}")
        return ", ".join(parts)


def normalized_score(
    returns: ArrayLike, reference_scores: tuple[float, float]
) -> NDArray[np.float64]:
    """Return 100 * (return - minimum) / (maximum - minimum), https://arxiv.org/abs/2004.07219.

    The reference scores are the returns of D4RL's random and expert policies in the environment.
    """
    low, high = reference_scores
    if not low < high:
        raise ValueError(f"reference_scores={reference_scores} must be (minimum, maximum)")
    return 100.0 * (np.asarray(returns, dtype=np.float64) - low) / (high - low)


def episode_seeds(seed: int, episodes: int) -> list[int]:
    """Return a seed per episode; those of the first k do not depend on the number of episodes."""
    return [int(state) for state in np.random.SeedSequence(seed).generate_state(episodes)]


def evaluate(
    policy: TensorDictModuleBase,
    env_id: str,
    *,
    episodes: int = 100,
    seed: int = 0,
    reference_scores: tuple[float, float] | None = None,
    num_envs: int | None = None,
    device: torch.device | str | None = None,
    observation: environments.Flatten | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    video: str | Path | None = None,
    report: Callable[[int], None] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Run episodes of a policy, deterministically, in parallel environments.

    At every step the policy is called once for all running episodes, see
    :func:`iwsft.acting.acting`. Actions are clipped to the bounds of the action space, and rounded
    where that holds whole numbers. Episode i starts from seed i of :func:`episode_seeds`; its
    return does not depend on ``num_envs``. An environment whose episode has ended takes the next
    episode.

    A policy may keep a history, which it must forget in a row where ``is_init`` is set, see
    :class:`iwsft.acting.PolicyInputs`.

    Args:
        policy: Policy that reads ``observation`` ``[n, obs]`` float32, and optionally ``is_init``
            (a first step, bool ``[n, 1]``) and ``reward`` (of the last action, float32 ``[n, 1]``),
            and writes ``action`` ``[n, act]``.
        env_id: Id in gymnasium, see :func:`iwsft.environments.make`.
        episodes: Number of episodes.
        seed: Seed of all episode seeds.
        reference_scores: D4RL's (minimum, maximum) return, for normalised scores.
        num_envs: Number of parallel environments; by default 32, or ``episodes`` if fewer.
        device: Device of the policy; by default that of its parameters.
        observation: Function from the environment's observation to a vector ``[obs]``; by default
            :func:`iwsft.environments.flattener`, D4RL's columns.
        env_kwargs: Arguments of the environment, such as ``tasks_to_complete`` of FrankaKitchen.
        video: MP4 file for the first episode, drawn off screen; the numbers stay the same.
        report: Function that is called after each episode with the number of those that ended.
        progress: Whether to show the number of episodes and the time left on stderr.

    Raises:
        ValueError: A setting or the policy does not fit, or the machine cannot draw.
        FloatingPointError: An action or a reward is not finite.
        RuntimeError: An episode has not ended after 100,000 steps, without a limit.

    Warns:
        UserWarning: A policy of this library or of ``baselines`` acts in [-1, 1], and the
            environment does not; or a wrapper of the environment has running statistics.
    """
    num_envs = ROWS if num_envs is None else num_envs
    check_count("episodes", episodes)
    check_count("num_envs", num_envs)
    if seed < 0:
        raise ValueError(f"{seed=} must not be negative")
    width = min(episodes, num_envs)
    if reference_scores is not None:
        normalized_score(0.0, reference_scores)  # refuses a wrong pair before the episodes
    check_keys(policy)
    device = _evaluation_device(policy, device)
    seeds, kwargs = episode_seeds(seed, episodes), env_kwargs or {}

    start = time.perf_counter()
    with acting(policy), ExitStack() as stack:
        make = partial(environments.make, env_id, **kwargs)
        opened: Any = make() if video is None else recorded(Path(video), env_id, kwargs)
        first = stack.enter_context(opened)
        flatten = observation or environments.flattener(first)
        name, actions = environments.id_of(first), environments.action_space(first)
        vector = flatten(first.reset(seed=seeds[0])[0])
        if vector.ndim != 1:
            raise ValueError(f"observations of {name} must be vectors, got shape {vector.shape}")
        check_sizes(policy, vector, actions.shape, name, device=device)
        beyond = bool(((actions.low != -1) | (actions.high != 1)).any())
        ours = type(policy).__module__.partition(".")[0] in ("iwsft", "baselines")
        if beyond and (ours or isinstance(policy, GaussianPolicy | MixturePolicy)):
            bounds = f"the actions of {name} have the bounds {actions.low} and {actions.high}"
            way_out = "pass the env_kwargs of the data that scale_actions=True has scaled"
            warnings.warn(f"{bounds}, and the policy acts in [-1, 1]: {way_out}", stacklevel=2)
        if moving := environments.moving_wrappers(first):
            problem = f"{moving} of {name} learns at each step, so returns depend on num_envs"
            way_out = "leave it out, or set its update_running_mean to False"
            warnings.warn(f"{problem}: {way_out}", stacklevel=2)
        envs = [first, *(stack.enter_context(make()) for _ in range(1, width))]
        display = stack.enter_context(Progress(shown=progress))
        task = display.add_task("episodes", total=episodes)

        def ended(count: int) -> None:
            if report is not None:
                report(count)
            display.update(task, completed=count)

        inputs = PolicyInputs(width, vector.size)
        finished = _roll_out(policy, inputs, envs, seeds, flatten, device, ended)

    returns = [episode.total for episode in finished]
    successes = [episode.success for episode in finished if episode.success is not None]
    scores = reference_scores and normalized_score(returns, reference_scores).tolist()
    return Evaluation(
        env_id=name,
        seed=seed,
        returns=returns,
        lengths=[episode.length for episode in finished],
        normalized_scores=scores,
        successes=successes if len(successes) == episodes else None,
        versions=environments.versions(first),
        wall_seconds=time.perf_counter() - start,
    )


@dataclass
class _Episode:
    index: int
    total: float = 0.0
    length: int = 0
    success: bool | None = None


def _roll_out(
    policy: TensorDictModuleBase,
    inputs: PolicyInputs,
    envs: Sequence[gym.Env[Any, Any]],
    seeds: Sequence[int],
    flatten: environments.Flatten,
    device: torch.device,
    ended: Callable[[int], None],
) -> list[_Episode]:
    """Run an episode per seed; environment i has row i of the batch."""
    bounds = environments.action_space(envs[0])
    limit = envs[0].spec.max_episode_steps if envs[0].spec is not None else None
    waiting = iter(range(len(seeds)))
    running: dict[int, _Episode] = {}
    finished: list[_Episode] = []

    def start(row: int) -> None:
        index = next(waiting, None)
        if index is None:
            inputs.end(row)
        else:
            observation = flatten(envs[row].reset(seed=seeds[index])[0])
            inputs.begin(row, observation, f"episode {index} (seed {seeds[index]})")
            running[row] = _Episode(index)

    for row in range(len(envs)):
        start(row)
    while running:
        actions = act(policy, inputs, device=device)
        clipped = np.clip(actions, bounds.low, bounds.high)
        clipped = environments.in_dtype(clipped, bounds.dtype)
        for row, episode in list(running.items()):
            following, reward, terminated, truncated, info = envs[row].step(clipped[row])
            episode.total += float(reward)
            episode.length += 1
            if not math.isfinite(episode.total):
                name = f"episode {episode.index} of {environments.id_of(envs[row])}"
                raise FloatingPointError(f"{name} got the reward {reward} at step {episode.length}")
            success = environments.success(info)
            if success is not None:
                episode.success = bool(episode.success) or bool(success)
            if terminated or truncated:
                finished.append(running.pop(row))
                ended(len(finished))
                start(row)
            elif episode.length == _ENDLESS and limit is None:
                name = f"episode {episode.index} of {environments.id_of(envs[row])}"
                raise RuntimeError(f"{name} has no end; pass env_kwargs={{'max_episode_steps': N}}")
            else:
                inputs.follow(row, flatten(following), float(reward))
    return sorted(finished, key=lambda episode: episode.index)


def _evaluation_device(
    policy: TensorDictModuleBase, device: torch.device | str | None
) -> torch.device:
    parameter = next(policy.parameters(), torch.empty(0, device=device))
    # With its index, where the name has none.
    if device is not None and torch.empty(0, device=device).device != parameter.device:
        raise ValueError(f"device={str(device)!r}, but the policy is on {parameter.device}")
    return parameter.device
