"""The command line of ``iwsft collect``: the settings of a collection."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from benchmarks.options import check_at_least, check_file, option

RANDOM = "random"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Collect a dataset from policies, or from an online run."""

    out: Annotated[str, option("FILE|minari:ID")]
    """FILE.hdf5 in D4RL's layout, or minari:NAMESPACE/NAME-v0 in Minari's local store."""
    policy: Annotated[tuple[str, ...], option("POLICY [POLICY ...]", "none, with --online")] = ()
    """Policies to roll out. Each is the folder of a finished run, FILE.npz (plain arrays, see
    benchmarks/collect/policies), MODULE:CALLABLE (called without arguments, it returns a
    TensorDictModule from "observation" to "action"), or "random" (uniform actions)."""
    online: Annotated[Literal["sac"] | None, option("sac", "none, with --policy")] = None
    """Learner that is trained from scratch in place of --policy; its replay is the dataset. Its
    learning curve and its policy, which --policy takes, are written to OUT's name with .sac."""
    env: Annotated[str | None, option("ID", "that of the policies' runs")] = None
    """Gymnasium id, or MODULE:ID for one of your own."""
    episodes: Annotated[tuple[int, ...], option("INT [INT ...]", "none, with --steps")] = ()
    """Episodes of each policy: one number for all, or one for each."""
    steps: Annotated[
        tuple[int, ...], option("INT [INT ...]", "400000 of SAC, as in D4RL's medium-replay sets")
    ] = ()
    """Least number of steps of each policy, in whole episodes, instead of --episodes; for SAC the
    steps of the run."""
    noise: Annotated[tuple[float, ...], option("FLOAT [FLOAT ...]")] = (0.0,)
    """Standard deviation of Gaussian noise on the policies' actions, in their unit: one number for
    all policies, or one for each."""
    stochastic: bool = False
    """Draw actions from the policies; by default they act deterministically."""
    seed: int = 0
    """Seed of everything drawn; episode i starts from seed i of iwsft's episode_seeds."""
    env_arg: Annotated[tuple[str, ...], option("NAME=VALUE [...]", "none")] = ()
    """Arguments of the environment as NAME=VALUE, such as continuing_task=False of AntMaze."""
    max_episode_steps: Annotated[int | None, option("INT", "the environment's own")] = None
    """Steps after which episodes are cut; needed where the environment has no limit of its own."""
    trust_env_module: bool = False
    """Import the module that the environment of a --policy folder names; it can run any code."""
    random_steps: int = 10_000
    """SAC's first steps, with uniform actions and no updates."""
    part_steps: int = 5_000
    """Steps between writes to OUT.partial, at the next end of an episode (of a group of 32, for
    policies). A kill loses the steps after the last write."""
    resume: bool = False
    """Continue a collection that was cut off; it ends in the same data as without interruption."""

    @property
    def amounts(self) -> tuple[int, ...]:
        """Episodes of each policy, or with ``--steps`` its least number of steps."""
        return self._for_each(self.episodes or self.steps)

    @property
    def noises(self) -> tuple[float, ...]:
        """Standard deviation of the noise of each policy; uniform actions get none."""
        pairs = zip(self.policy, self._for_each(self.noise), strict=True)
        return tuple(0.0 if name == RANDOM else noise for name, noise in pairs)

    def _for_each(self, values: tuple[T, ...]) -> tuple[T, ...]:
        return values * len(self.policy) if len(values) == 1 else values


def check_options(options: Options) -> None:
    """Check options that do not need the policies or the environment."""
    if bool(options.policy) == (options.online is not None):
        raise ValueError("give either --policy (one or several) or --online sac")
    for name in options.policy:
        check_file(name)
    if not 0 <= options.seed < 2**64:
        raise ValueError(f"--seed {options.seed}: a seed lies in 0 ... 2^64 - 1")
    check_at_least(1, part_steps=options.part_steps, max_episode_steps=options.max_episode_steps)
    least = {name: min(getattr(options, name), default=1) for name in ("episodes", "steps")}
    check_at_least(1, **least)
    for noise in options.noise:
        if not 0 <= noise < math.inf:
            raise ValueError(f"--noise {noise} must not be negative, nor infinite")
    if options.online is None:
        if bool(options.episodes) == bool(options.steps):
            raise ValueError("give either --episodes or --steps: how much of each policy")
        for values in (options.episodes or options.steps, options.noise):
            if len(values) not in (1, len(options.policy)):
                many = f"{list(values)} for {len(options.policy)} policies"
                raise ValueError(f"{many}: one number for all or one for each")
        if any(options.noise) and set(options.policy) == {RANDOM}:
            raise ValueError("--noise is for a policy's actions; those of 'random' are uniform")
        return
    check_at_least(1, random_steps=options.random_steps)
    if options.episodes or len(options.steps) > 1:
        raise ValueError("--online sac runs for one number of --steps, not for --episodes")
    if any(options.noise) or options.stochastic:
        raise ValueError("--noise and --stochastic are for --policy; SAC always draws its actions")
    if options.env is None:
        raise ValueError("--online sac needs --env")
    if options.steps and options.steps[0] <= options.random_steps:
        drawn = f"the first {options.random_steps} steps are random (--random-steps)"
        raise ValueError(f"--steps {options.steps[0]}: {drawn}, so SAC would learn nothing")


def env_arguments(env_arg: Sequence[str], max_episode_steps: int | None) -> dict[str, Any]:
    """Return the environment's keyword arguments; a VALUE that is not a literal is a string."""
    arguments: dict[str, Any] = {}
    for argument in env_arg:
        name, equals, value = argument.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--env-arg {argument}: it reads NAME=VALUE")
        arguments[name] = value
        with suppress(SyntaxError, ValueError):
            arguments[name] = ast.literal_eval(value)
    if max_episode_steps is not None:
        if "max_episode_steps" in arguments:
            raise ValueError("give max_episode_steps once: by its flag, or by --env-arg")
        arguments["max_episode_steps"] = max_episode_steps
    return arguments
