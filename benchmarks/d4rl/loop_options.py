"""The options of ``iwsft d4rl loop``: its command line and its settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from benchmarks.d4rl.options import ALGORITHMS, Options, Weighting, check_options, choose_suite
from benchmarks.options import check_at_least, check_known, check_seeds, check_used, option

# Prefix of --start before the name of a dataset.
CLONE = "bc:"
TUNED = [name for name, algorithm in ALGORITHMS.items() if algorithm.from_reference]
# Options that do not decide the result, or that are known by what they lead to.
_NOT_SETTINGS = {
    *("start", "env", "env_arg", "max_episode_steps", "rounds"),
    *("trust_env_module", "out", "resume"),
}


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """What to repeat."""

    start: Annotated[str, option("FOLDER|bc:DATASET")]
    """Policy to start from: the folder of a finished run, or bc:DATASET for a clone of a dataset's
    behaviour."""
    env: Annotated[str | None, option("ID", "that of --start")] = None
    """Gymnasium id of the environment, or MODULE:ID for one of your own."""
    rounds: int = 4
    """Number of rounds; with --resume it may be larger than before."""
    episodes_per_round: int = 64
    """Episodes that the stochastic policy acts in, in a round."""
    algo: Annotated[str, option("NAME", help=f"One of {', '.join(TUNED)}.")] = "iw-sft-q"
    seed: int = 0
    """Seed of episodes, actions and batches."""
    env_arg: Annotated[tuple[str, ...], option("NAME=VALUE [...]", "none")] = ()
    """Arguments of the environment as NAME=VALUE."""
    max_episode_steps: Annotated[int | None, option("INT", "the environment's own")] = None
    """Steps after which episodes are cut; needed where the environment has no limit of its own."""
    trust_env_module: bool = False
    """Import the module that the environment of --start names; it can run any code."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which episodes to train on."""

    top: Annotated[float | None, option("PERCENT", "10")] = None
    """Share of the episodes of this and the kept rounds to fine-tune on, in %; the finer bins of
    sft-q and iw-sft-q shrink with it."""
    keep_rounds: int = 0
    """Number of earlier rounds whose episodes are selected from, too, each with the
    log-probabilities of the policy that acted in it as its reference."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train."""

    steps: int = 500
    """Updates of a round."""
    learning_rate: Annotated[float | None, option("FLOAT", "Table 4")] = None
    """Peak of the learning rate of a round."""
    start_steps: Annotated[int | None, option("INT", "1000, with bc:DATASET")] = None
    """Updates of the clone of bc:DATASET; few give a weak start."""
    reference_steps: Annotated[int | None, option("INT", "none, the reference is exact")] = None
    """Updates of a reference that each round clones from its episodes, as offline data need it; the
    exact one is the policy that acted."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How policies are scored."""

    eval_episodes: int = 100
    """Episodes of the score after each round, with the policy's mean actions."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where results go."""

    out: Path = Path("runs/loop")
    """Folder of the loop: OUT/round-K/."""
    resume: bool = False
    """Continue a loop that was cut off; stages that ended are kept."""


@dataclass(frozen=True, kw_only=True)
class LoopOptions(Repetition, Selection, Training, Weighting, Scoring, Output):
    """Roll out a policy, fine-tune on the best episodes, score, and again."""

    @property
    def dataset(self) -> str | None:
        """Name of the dataset that the start is cloned from."""
        return self.start.removeprefix(CLONE) if self.start.startswith(CLONE) else None

    @property
    def settings(self) -> dict[str, Any]:
        """The options that decide the result."""
        return {name: value for name, value in vars(self).items() if name not in _NOT_SETTINGS}

    @property
    def training(self) -> Options:
        """The options of a run that trains as a round does."""
        shared = {each.name for each in fields(Weighting)} | {"steps", "top", "eval_episodes"}
        return Options(
            algo=(self.algo,),
            seeds=(self.seed,),
            # The stated share is kept, where many episodes have the best return, too.
            ties="rank",
            reference_steps=self.start_steps or 1000,
            **{name: getattr(self, name) for name in shared},
        )

    def __post_init__(self) -> None:
        check_known("algorithm", self.algo, TUNED)
        check_seeds((self.seed,), "seed")
        counts = (
            *("rounds", "episodes_per_round", "max_episode_steps"),
            *("start_steps", "reference_steps"),
        )
        check_at_least(1, **{name: getattr(self, name) for name in counts})
        check_at_least(0, keep_rounds=self.keep_rounds)
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--learning-rate {self.learning_rate}: a finite number above 0")
        if self.start_steps is not None and self.dataset is None:
            raise ValueError(f"--start-steps {self.start_steps} is for --start {CLONE}DATASET")
        weighted = ALGORITHMS[self.algo].weighted
        check_used("reference_steps", self.reference_steps, weighted, f"in {self.algo}")
        check_options(self.training, choose_suite(self.training))
