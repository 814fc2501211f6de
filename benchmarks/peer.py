"""Train and score d3rlpy's IQL, TD3+BC, CQL and AWAC as ours are trained and scored.

Example:
    python -m benchmarks.peer --algo iql td3-bc --dataset hopper-medium-replay-v2 --seeds 0 1 2

d3rlpy 2.8.1 requires gym and another version of gymnasium. It works with the gymnasium of this
project when it is installed without its requirements; where it is missing, the error says how.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from baselines.iql import MAX_WEIGHT
from baselines.rewards import Rewards, clipped_actions
from benchmarks import runs, stopping
from benchmarks.commands import typed
from benchmarks.d4rl import options as d4rl
from benchmarks.d4rl.job import SAME
from benchmarks.d4rl.run import Run, Task, check_run, config_of, sizes
from benchmarks.d4rl.settings import name_in_tables
from benchmarks.d4rl.train import learning_curve_probe, score_policy
from benchmarks.options import option, parse
from benchmarks.sweep import tell_score
from iwsft.files import alone_in
from iwsft.metrics import MetricsLog
from iwsft.training import Cost, Row
from iwsft.trajectory import ACTION, NEXT_OBSERVATION, OBSERVATION, REWARD, TERMINATED, TRAJ_IDS

INSTALL = (
    "pip install --no-deps d3rlpy==2.8.1 gym==0.26.2 gym-notices; "
    "pip install structlog colorama dataclasses-json scikit-learn"
)
# Length of an epoch of d3rlpy, which reports after each.
_EPOCH = 10_000
_ORDER = (
    "d3rlpy moves the critics first and takes the actor's loss at the new ones; ours takes all "
    "losses at the same parameters"
)
# The differences that no setting removes, checked against d3rlpy 2.8.1.
APART: Mapping[str, tuple[str, ...]] = {
    "iql": (
        _ORDER,
        "d3rlpy's log-std is a sigmoid between -5 and 2, at -1.5 at the start; ours is clamped to "
        "that range, 0 at the start",
    ),
    "awac": (
        _ORDER,
        "d3rlpy's weights are the batch's softmax of A / lambda times its size; ours are "
        "exp(A / lambda), clipped at max_weight",
        "d3rlpy draws next actions as tanh(Normal(mean before tanh, std)), the policy that it "
        "clones is Normal(tanh(mean), std); ours draws from the policy, clamped",
        "d3rlpy's log-std is a sigmoid between -6 and 0, at -3 at the start; ours is clamped to "
        "[-5, 2], 0 at the start",
        "d3rlpy's critic targets have SAC's entropy at temperature 1; AWAC's paper has no such "
        "term, so the temperature is 0 here",
    ),
    "td3-bc": (
        _ORDER,
        "d3rlpy's actor and targets move at the first update and each policy_delay-th after it, "
        "ours at each policy_delay-th",
    ),
    "cql": (
        _ORDER,
        "d3rlpy's layers start as torch's do; ours are orthogonal in the critics, and near 0 in "
        "the last layers",
        "d3rlpy bootstraps from the policy's mode, ours from a draw",
        "with max_q_backup, d3rlpy takes the best of the least Q, ours the least of each Q's best",
        "d3rlpy has no least_gap",
        "d3rlpy's log-std has no offset of -1 at the start",
    ),
}
# A config as d3rlpy writes it to JSON: ``type`` and ``params``.
Config = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Runs of d3rlpy, one after the other, on one thread."""

    algo: Annotated[tuple[str, ...], option("NAME [NAME ...]")]
    """One or several of iql, td3-bc, cql and awac."""
    dataset: Annotated[str, option("NAME|FILE")] = "hopper-replay-mini"
    """Bundled or D4RL name, Minari id, or an HDF5 file in D4RL's layout."""
    seeds: Annotated[tuple[int, ...], option("INT [INT ...]")] = (0,)
    """Seeds, one run each. Evaluation starts from the episodes of our run of the same seed."""
    steps: Annotated[int | None, option("INT", "the baseline's published number")] = None
    """Updates."""
    eval_episodes: int = 100
    """Episodes of the final score."""
    out: Path = Path("runs/d3rlpy")
    """Folder of all runs: OUT/d4rl/DATASET/ALGO/seed-K/. In a report on the folder above it, its
    name is a variant: d3rlpy/iql and iql."""
    resume: bool = False
    """Keep finished runs; those that were cut off start again."""


@stopping.ends_in_one_line()
def main(options: Options) -> None:
    """Train and score all runs; an error that a user can mend ends it in one line."""
    for run, task in claim_runs(options):
        train_and_score(run, task)
        tell_score(run)


def claim_runs(options: Options) -> list[tuple[Run, Task]]:
    """Check options, packages and data, and claim all runs; the unfinished ones with their data."""
    ours = d4rl.Options(**vars(options) | {"dataset": (options.dataset,)})
    d4rl.check_options(ours, d4rl.choose_suite(ours))
    for algo in options.algo:
        if algo not in APART:
            raise ValueError(f"d3rlpy has no {algo!r} like ours; it has {', '.join(APART)}")
    import_d3rlpy()
    task = Task.load(options.dataset)
    task.check_environment()
    source, known = options.dataset, name_in_tables(task.dataset)
    all_runs = [
        Run(d4rl.name_of(source), algo, seed, ours, source, known)
        for algo in options.algo
        for seed in options.seeds
    ]
    for run in {run.algo: run for run in all_runs}.values():
        check_run(run, task)
    configs = {run: _config_of(run, task) for run in all_runs}
    resume = configs if options.resume else ()
    unfinished = runs.claim(options.out / Run.benchmark, configs, same=SAME, resume=resume)
    return [(run, task) for run in unfinished]


def _config_of(run: Run, task: Task) -> dict[str, Any]:
    """The content of ``config.json``."""
    config, release = config_of(run, task), version("d3rlpy")
    for name in ("preset", "estimator", "options"):
        del config[name]
    theirs = d3rlpy_config(run.algo, run.baseline_settings[0])
    config["settings"] |= {"peer": f"d3rlpy {release}", "d3rlpy": theirs}
    config["versions"]["d3rlpy"] = release
    command = typed("peer")
    return config | {"apart": list(APART[run.algo]), "command": command}


def train_and_score(run: Run, task: Task) -> dict[str, Any]:
    """Train and score one run on one thread; its folder must be claimed."""
    torch.set_num_threads(1)
    with alone_in(run.folder, wait=False):
        trajectories, steps = task.dataset.trajectories, run.updates
        since, cpu_since = time.perf_counter(), time.process_time()
        data = d3rlpy_data(run.algo, trajectories)
        config = d3rlpy_config(run.algo, run.baseline_settings[0])
        learner = create_learner(config, *sizes(trajectories), seed=run.seed)
        policy = TensorDictModule(
            lambda observation: torch.from_numpy(learner.predict(observation.numpy())),
            in_keys=[OBSERVATION],
            out_keys=[ACTION],
        )
        probe = learning_curve_probe(run, task, policy, steps)
        before = 0
        log = MetricsLog(run.folder)
        for step, losses in train(learner, data, steps):
            row: Row = {"step": step, **losses}
            if step // probe.every > before // probe.every or step == steps:
                row |= probe.look(TensorDict())
            row["wall_seconds"] = time.perf_counter() - since
            before = step
            log.write(row)
            score = row.get("normalized_score", row.get("return_mean"))
            shown = "" if score is None else f"  score {score:.1f}"
            runs.tell(f"{run}  {step}/{steps}  {row['wall_seconds']:.0f} s{shown}")
        cost = Cost(time.perf_counter() - since, time.process_time() - cpu_since)
        return score_policy(run, task, policy, cost, {"peer": f"d3rlpy {version('d3rlpy')}"})


def import_d3rlpy() -> Any:
    """Return the package d3rlpy, which then logs only errors."""
    try:
        d3rlpy = import_module("d3rlpy")
        structlog = import_module("structlog")
    except ImportError as error:
        raise ImportError(f"d3rlpy can't be imported ({error}); {INSTALL}") from error
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    return d3rlpy


def create_learner(config: Config, observation_dim: int, action_dim: int, *, seed: int) -> Any:
    """Return an untrained learner of d3rlpy, after seeding all its generators."""
    d3rlpy = import_d3rlpy()
    d3rlpy.seed(seed)
    registry = import_module("d3rlpy.serializable_config").CONFIG_STORAGE
    kind = registry[d3rlpy.base.LearnableConfig].config_list[config["type"]]
    # d3rlpy does not read a config that lacks parts.
    whole = {**kind().serialize_to_dict(), **config["params"]}
    learner = kind.deserialize_from_dict(whole).create(device="cpu:0")
    learner.create_impl((observation_dim,), action_dim)
    if config["type"] == "awac":
        # AWAC has no entropy in its targets; d3rlpy's are SAC's, at temperature exp(0).
        for log_temperature in learner.impl.modules.log_temp.parameters():
            nn.init.constant_(log_temperature, -math.inf)
    return learner


def train(learner: Any, data: Any, steps: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Run d3rlpy's loop; yield the updates so far and the means of the losses, epoch by epoch."""
    quiet = import_d3rlpy().logging.NoopAdapterFactory()
    epoch = min(_EPOCH, max(1, steps // 10))
    done = 0
    # The loop leaves out the updates after the last whole epoch, so they are an epoch of their own.
    for part, length in ((steps - steps % epoch, epoch), (steps % epoch, steps % epoch)):
        if part == 0:
            continue
        options = {"n_steps": part, "n_steps_per_epoch": length, "show_progress": False}
        for _, losses in learner.fitter(data, logger_adapter=quiet, **options):
            done += length
            yield done, {k: v for k, v in losses.items() if not k.startswith("time_")}


def d3rlpy_data(algo: str, trajectories: TensorDictBase) -> Any:
    """Return the trajectories as d3rlpy's ``MDPDataset``; its scalers are part of the learner."""
    d3rlpy = import_d3rlpy()
    # IQL learns from actions short of -1 and 1; d3rlpy takes actions as they are.
    data = clipped_actions(trajectories) if algo == "iql" else trajectories
    # Otherwise d3rlpy guesses the space from the values of the first episode.
    continuous = d3rlpy.ActionSpace.CONTINUOUS
    return d3rlpy.dataset.MDPDataset(**arrays(data), action_space=continuous)


def arrays(trajectories: TensorDictBase) -> dict[str, NDArray[np.float32]]:
    """Return ``observations``, ``actions``, ``rewards``, ``terminals``, ``timeouts``.

    d3rlpy takes next observations from the next row, and drops the last row of an episode that did
    not terminate. So such an episode gets one more row, which d3rlpy never draws as a step.
    """
    ids = trajectories.get(TRAJ_IDS)
    observation, following = (trajectories.get(key) for key in (OBSERVATION, NEXT_OBSERVATION))
    terminated = trajectories.get(TERMINATED).squeeze(-1)
    last = torch.ones_like(ids, dtype=torch.bool)
    last[:-1] = ids[1:] != ids[:-1]
    torn = (following[:-1] != observation[1:]).any(-1) & ~last[:-1]
    for wrong, what in (
        (torn, "a next observation that is not the next row's observation"),
        (terminated & ~last, "a termination with further steps behind it"),
    ):
        if bool(wrong.any()):
            where = f"step {int(wrong.nonzero()[0])} has {what} ({int(wrong.sum())} steps do)"
            raise ValueError(f"{where}; d3rlpy can't hold such data")
    extra = last & ~terminated
    # The row of each step: one further for each row inserted before it.
    row = torch.arange(len(ids)) + extra.cumsum(0) - extra.long()
    closing = row[extra] + 1

    def insert(steps: torch.Tensor, rows: torch.Tensor | float) -> NDArray[np.float32]:
        out = torch.empty(len(ids) + len(closing), *steps.shape[1:])
        out[row], out[closing] = steps.float(), torch.as_tensor(rows)
        return out.numpy()

    return {
        "observations": insert(observation, following[extra]),
        "actions": insert(trajectories.get(ACTION), 0.0),
        "rewards": insert(trajectories.get(REWARD), 0.0),
        "terminals": insert(terminated, 0.0),
        "timeouts": insert(torch.zeros_like(terminated), 1.0),
    }


def d3rlpy_config(algo: str, settings: Any) -> Config:
    """Return d3rlpy's config for the settings of a baseline, an algorithm of ``APART``."""
    kind, params = {"iql": _iql, "awac": _awac, "td3-bc": _td3_bc, "cql": _cql}[algo](settings)
    common = {name: getattr(settings, name) for name in ("batch_size", "gamma", "tau")}
    return _typed(kind, **common, n_critics=2, **params)


def _iql(settings: Any) -> tuple[str, Config]:
    decay = _typed("cosine_annealing", T_max=settings.steps)
    return "iql", {
        **_networks_and_rewards(settings),
        "expectile": settings.expectile,
        "weight_temp": settings.temperature,
        "max_weight": MAX_WEIGHT,
        "actor_optim_factory": _typed("adam", lr_scheduler_factory=decay),
        "actor_encoder_factory": _layers(settings.hidden, dropout=settings.dropout),
        "value_encoder_factory": _layers(settings.hidden),
    }


def _awac(settings: Any) -> tuple[str, Config]:
    return "awac", {
        **_networks_and_rewards(settings),
        "lam": settings.temperature,
        "n_action_samples": 1,
        "observation_scaler": _typed("standard"),
    }


def _td3_bc(settings: Any) -> tuple[str, Config]:
    return "td3_plus_bc", {
        **_networks_and_rewards(settings),
        "alpha": settings.alpha,
        "target_smoothing_sigma": settings.policy_noise,
        "target_smoothing_clip": settings.noise_clip,
        "update_actor_interval": settings.policy_delay,
        "observation_scaler": _typed("standard"),
    }


def _cql(settings: Any) -> tuple[str, Config]:
    threshold, weight = settings.lagrange_threshold, settings.min_q_weight
    rewards = {"multiplier": settings.reward_scale, "shift": settings.reward_shift}
    return "cql", {
        "actor_learning_rate": settings.actor_lr,
        "critic_learning_rate": settings.critic_lr,
        "temp_learning_rate": settings.actor_lr,
        # A rate of 0 leaves the multiplier at its start.
        "alpha_learning_rate": 0.0 if threshold is None else settings.critic_lr,
        "initial_alpha": 1.0,
        # d3rlpy's threshold applies before the weight.
        "alpha_threshold": 0.0 if threshold is None or not weight else threshold / weight,
        "conservative_weight": weight,
        "n_action_samples": settings.actions,
        "soft_q_backup": False,
        "max_q_backup": settings.max_q_backup,
        "actor_encoder_factory": _layers(settings.actor_hidden),
        "critic_encoder_factory": _layers(settings.critic_hidden),
        "reward_scaler": _typed("shift", **rewards, multiply_first=True),
        "observation_scaler": _typed("standard" if settings.normalize else "none"),
    }


def _networks_and_rewards(settings: Any) -> Config:
    rewards: Mapping[Rewards, Config] = {
        "as they are": _typed("none"),
        "return range": _typed("return", multiplier=1000.0),
        "minus one": _typed("shift", shift=-1.0),
    }
    return {
        "actor_learning_rate": settings.lr,
        "critic_learning_rate": settings.lr,
        "actor_encoder_factory": _layers(settings.hidden),
        "critic_encoder_factory": _layers(settings.hidden),
        "reward_scaler": rewards[settings.rewards],
    }


def _layers(hidden: Sequence[int], dropout: float = 0.0) -> Config:
    return _typed("vector", hidden_units=list(hidden), dropout_rate=dropout or None)


def _typed(kind: str, **params: Any) -> Config:
    return {"type": kind, "params": params}


if __name__ == "__main__":
    stopping.watch()
    with stopping.command():
        main(parse(Options, "peer", __doc__))
