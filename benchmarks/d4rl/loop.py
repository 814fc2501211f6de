"""The loop for control: roll out, score, keep the best episodes, fine-tune, test, and again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs.utils import ExplorationType

from baselines import Learner
from benchmarks import stopping
from benchmarks.collect.job import find_simulator
from benchmarks.collect.options import env_arguments
from benchmarks.collect.output import joined, packed
from benchmarks.collect.rollout import Behaviour, Simulator, roll_out
from benchmarks.commands import typed
from benchmarks.d4rl.loop_options import CLONE, LoopOptions
from benchmarks.d4rl.run import Run, sizes
from benchmarks.d4rl.settings import family_of
from benchmarks.d4rl.train import build_cloning, build_fine_tuning
from benchmarks.options import to_config
from benchmarks.report.loops import LOOP, show_loop
from benchmarks.runs import hardware, tell, versions
from benchmarks.statistics import t_interval
from iwsft import checkpoint, datasets, metrics
from iwsft.acting import ROWS, acting
from iwsft.curation import curate, join, trajectory_returns
from iwsft.datasets import OfflineDataset
from iwsft.datasets.catalog import reference_scores
from iwsft.evaluation import episode_seeds, evaluate
from iwsft.files import write_json
from iwsft.fingerprint import fingerprint
from iwsft.loop import Round, Stages, run_loop
from iwsft.policies import GaussianPolicy
from iwsft.reference import annotate_reference
from iwsft.trained_policy import FILE, TrainedPolicy, folder_of_run, load_policy, save_policy
from iwsft.training import Probe
from iwsft.trajectory import MULTIPLICITY, REF_LOG_PROB, lengths, per_trajectory

# Files of a round, beside those of its stages.
SCORES, CURATED, EVALUATION = "scores.json", "curated.pt", "evaluation.json"
TRAINING, REFERENCE = "training", "reference"
# Entry of curated steps: the round of their episode.
ROUND = "round"
_DAMAGED = "put a copy of it back, or remove its folder, and --resume makes it again"


@dataclass(frozen=True)
class Start:
    """The policy that the loop starts from, or the dataset that it is cloned from."""

    folder: Path
    policy: TrainedPolicy
    digest: str
    dataset: OfflineDataset | None = None

    @classmethod
    def find(cls, options: LoopOptions) -> Start:
        """Read ``--start``; a clone is not trained yet."""
        if options.dataset is None:
            folder = folder_of_run(options.start)
            if not (folder / FILE).is_file():
                ways = f"a finished run's folder, OUT/d4rl/DATASET/ALGO/seed-K, or {CLONE}DATASET"
                raise ValueError(f"--start {options.start}: no {FILE} there; give {ways}")
            # Modules that the environment names are asked about where it is chosen.
            policy = load_policy(folder, trust_env_module=True)
            if policy.has_memory or not hasattr(policy.module, "log_prob"):
                problem = "its actions have no log-probabilities that depend on the step alone"
                way_out = f"start from a run of sft, iw-sft, bc or iql, or from {CLONE}DATASET"
                raise ValueError(f"--start {options.start}: {problem}; {way_out}")
            return cls(folder, policy, fingerprint(dict(policy.module.state_dict())))
        trust = options.trust_env_module
        data = datasets.load(options.dataset, scale_actions=True, trust_env_module=trust)
        observation_dim, action_dim = sizes(data.trajectories)
        form = GaussianPolicy(observation_dim, action_dim)
        environment = data.env_id, data.env_kwargs, data.reference_scores
        policy = TrainedPolicy(form, *environment, observation_dim)
        return cls(options.out / "start", policy, data.fingerprint, data)

    def simulator(self, options: LoopOptions) -> Simulator:
        """The environment of the loop, with actions in [-1, 1]; the policy must fit it."""
        known = self.policy.env_id, self.policy.env_kwargs
        behaviour = Behaviour(options.start, self.policy.module, *known, flag="--start")
        arguments = env_arguments(options.env_arg, options.max_episode_steps)
        trusted = options.trust_env_module
        simulator = find_simulator([behaviour], options.env, arguments, trusted=trusted)
        low, high = simulator.low, simulator.high
        if (low != -1).any() or (high != 1).any():
            # Policies act in [-1, 1].
            bounds = {"action_bounds": [low.tolist(), high.tolist()]}
            simulator = Simulator.of(simulator.env_id, simulator.kwargs | bounds)
        return simulator


class ControlLoop:
    """The five stages of control, see :class:`iwsft.loop.Stages`."""

    def __init__(self, options: LoopOptions, start: Start, simulator: Simulator) -> None:
        self.options, self.start, self.simulator = options, start, simulator
        policy, kwargs = start.policy, simulator.kwargs
        if (simulator.env_id, kwargs) == (policy.env_id, policy.env_kwargs):
            self.reference_scores = policy.reference_scores
        else:
            known = {name: x for name, x in kwargs.items() if name != "action_bounds"}
            self.reference_scores = reference_scores(simulator.env_id, known)

    def stages(self) -> Stages:
        """The stages as the loop takes them."""
        return Stages(self.generate, self.score, self.curate, self.fine_tune, self.evaluate)

    @property
    def settings(self) -> dict[str, Any]:
        """The plain values that decide the result."""
        start = {"start": self.start.digest, "cloned": self.start.dataset is not None}
        environment = {"env_id": self.simulator.env_id, "env_kwargs": self.simulator.kwargs}
        return start | environment | self.options.settings

    def generate(self, one: Round) -> dict[str, Any]:
        """Let the policy draw actions for all episodes, in groups; each is a file of its own."""
        policy, round_seed = self._load(one.policy), self._seed(one)
        seeds = episode_seeds(round_seed, self.options.episodes_per_round)
        groups = [seeds[first : first + ROWS] for first in range(0, len(seeds), ROWS)]
        behaviour = Behaviour(self.options.start, policy.module, flag=f"round {one.number} of")
        envs = [self.simulator.make(as_drawn=True) for _ in groups[0]]
        try:
            for number, group in enumerate(groups):
                path = _group(one, number)
                if path.exists():
                    continue
                with acting(policy.module, ExplorationType.RANDOM):
                    episodes = roll_out(behaviour, envs[: len(group)], group, noise=0.0)
                data = packed(joined(episodes), str(path))
                # By the path of training, whose last bits may differ from those of acting.
                _write(path, annotate_reference(policy.module, data))
        finally:
            for env in envs:
                env.env.close()
        return {"episodes": len(seeds), "steps": len(self._read_round(one))}

    def score(self, one: Round) -> dict[str, Any]:
        """Add up the rewards of each episode."""
        data = self._read_round(one)
        returns, steps = trajectory_returns(data), lengths(data)
        write_json(one.folder / SCORES, {"returns": returns.tolist(), "lengths": steps.tolist()})
        mean, most = float(returns.mean()), float(returns.max())
        return {"return": mean, "return_max": most, "length": float(steps.double().mean())}

    def curate(self, one: Round) -> dict[str, Any]:
        """Keep the top share of the episodes of this round and the last ones together."""
        pool = self._pool(one)
        scores, cuts = trajectory_returns(pool), self._run(one).algorithm.cuts
        if max(cuts) > 0 and bool((scores == scores[0]).all()):
            same = f"all {len(scores)} episodes have the return {float(scores[0]):.4g}"
            ways = "more --episodes-per-round, another --start, or --top 100 for all"
            return {"stop": f"{same}, so none is better and the policy stays as it is; try {ways}"}
        with stopping.warnings_until("; ties="):
            curated = curate(pool, cuts=cuts, ties="rank", seed=self._seed(one))
        _write(one.folder / CURATED, curated)
        survivors, rounds = trajectory_returns(curated), per_trajectory(curated, ROUND)
        counts = per_trajectory(curated, MULTIPLICITY)
        facts = {
            "pool": len(scores),
            "kept": len(survivors) / len(scores),
            "kept_episodes": len(survivors),
            "replayed": int((rounds < one.number).sum()),
            "by_multiplicity": {str(n): int((counts == n).sum()) for n in counts.unique().tolist()},
            "return_least_kept": float(survivors.min()),
            "return_kept": float(survivors.mean()),
        }
        replayed = f", {facts['replayed']} of them replayed" if facts["replayed"] else ""
        least = f"with returns from {facts['return_least_kept']:.1f}"
        kept = f"{facts['kept_episodes']} of {facts['pool']} episodes kept"
        tell(f"round {one.number}: {kept} {least}{replayed}")
        return facts

    def _pool(self, one: Round) -> TensorDictBase:
        """All episodes of this round and the last ones."""
        rounds = [*one.earlier(self.options.keep_rounds), one]
        return join(*map(self._read_round, rounds)).exclude(MULTIPLICITY)

    def _read_round(self, one: Round) -> TensorDictBase:
        """All episodes of a round, in the order of their seeds, with their round."""
        groups = range(math.ceil(self.options.episodes_per_round / ROWS))
        data = join(*(_read(_group(one, number)) for number in groups)).exclude(MULTIPLICITY)
        return data.set(ROUND, torch.full((len(data),), one.number))

    def fine_tune(self, one: Round) -> dict[str, Any]:
        """Train the round's policy on the curated episodes, by the pieces of a run."""
        folder = one.folder / TRAINING
        policy = self._load(one.policy)
        data = curated_data(one, policy)
        run = self._run(one)
        run.weights.check_overflow(int(lengths(data).max()))
        if steps := self.options.reference_steps:
            schedule = replace(run.reference_schedule, steps=steps)
            clone = build_cloning(run, self._pool(one), schedule)
            self._fit(clone, one.folder / REFERENCE, steps)
            annotate_reference(clone.policy, data)
        # Layers with noise draw the same after a kill.
        torch.manual_seed(run.seed)
        learner, probes = build_fine_tuning(run, data, policy.module)
        if self.options.learning_rate is not None:
            schedule = replace(run.schedule, lr=self.options.learning_rate)
            learner = replace(learner, schedule=schedule)
        self._fit(learner, folder, self.options.steps, probes)
        # In the form of the policy before, whatever algorithm made that.
        content = checkpoint.read(Path(one.policy) / FILE, _DAMAGED)
        state = {name: value.cpu() for name, value in policy.module.state_dict().items()}
        environment = {"env_id": self.simulator.env_id, "env_kwargs": self.simulator.kwargs}
        content |= {**environment, "reference_scores": self.reference_scores, "state": state}
        checkpoint.write(one.folder / FILE, content)
        last = metrics.read(folder / metrics.FILE)[-1]
        shown: dict[str, Any] = {name: last[name] for name in ("ESS", "weight_max") if name in last}
        return {"policy": one.folder.name, "updates": self.options.steps, **shown}

    def evaluate(self, one: Round) -> dict[str, Any]:
        """Score the mean actions of the round's policy; the start is cloned before it is scored."""
        if one.number == 0 and self.start.dataset is not None:
            self._clone(self.start.dataset)
        result = evaluate(
            self._load(one.trained).module,
            self.simulator.env_id,
            episodes=self.options.eval_episodes,
            seed=self.options.seed,
            reference_scores=self.reference_scores,
            env_kwargs=self.simulator.kwargs,
        )
        scores = result.normalized_scores or result.returns
        episodes = {"returns": result.returns, "lengths": result.lengths, "scores": scores}
        write_json(one.folder / EVALUATION, episodes)
        facts = {"score": float(np.mean(scores)), "eval_return": result.return_mean}
        if len(scores) < 2:
            return facts
        return {**facts, "interval": [float(end) for end in t_interval(scores)]}

    def _clone(self, data: OfflineDataset) -> None:
        """Clone the start from a dataset, in few updates."""
        folder = self.start.folder
        run = self._run()
        learner = build_cloning(run, data.trajectories, run.reference_schedule)
        tell(f"cloning the start from {data.name}")
        self._fit(learner, folder, run.reference_schedule.steps)
        policy = replace(
            self.start.policy,
            module=learner.policy,
            env_id=self.simulator.env_id,
            env_kwargs=self.simulator.kwargs,
            reference_scores=self.reference_scores,
        )
        save_policy(folder, policy, algo="bc", action_dim=sizes(data.trajectories)[1])

    def _fit(
        self, learner: Learner, folder: Path, steps: int, probes: Sequence[Probe] = ()
    ) -> None:
        learner.fit(
            probes=probes,
            folder=folder,
            settings=self.settings,
            log_every=max(1, steps // 20),
            checkpoint_every=min(500, max(1, steps // 5)),
            report=lambda _: stopping.check(),
        )

    def _load(self, folder: str) -> TrainedPolicy:
        # The environment is that of the loop, which was asked about.
        return load_policy(folder, trust_env_module=True)

    def _seed(self, one: Round) -> int:
        return episode_seeds(self.options.seed, one.number)[-1]

    def _run(self, one: Round | None = None) -> Run:
        """The run whose pieces train a round, or the start."""
        seed = self.options.seed if one is None else self._seed(one)
        family = family_of(self.simulator.env_id)
        return Run(family, self.options.algo, seed, self.options.training, source=family)


def curated_data(one: Round, policy: TrainedPolicy) -> TensorDictBase:
    """The curated episodes of a round, with the reference that its training starts from.

    Episodes of earlier rounds have the log-probs of their own policy. Those of this round get them
    anew, computed in the batches of training, so that their first ratios are exactly 1.
    """
    data = _read(one.folder / CURATED)
    own, known = data.get(ROUND) == one.number, data.get(REF_LOG_PROB)
    annotate_reference(policy.module, data)
    data.set(REF_LOG_PROB, torch.where(own, data.get(REF_LOG_PROB), known))
    return data.exclude(ROUND)


def run_rounds(options: LoopOptions) -> list[dict[str, Any]]:
    """Run the loop of a command line, or what is missing of it, and print the table."""
    # As for runs: the numbers do not depend on the number of threads.
    torch.set_num_threads(1)
    start = Start.find(options)
    loop = ControlLoop(options, start, start.simulator(options))
    about = {
        "benchmark": LOOP,
        "env_id": loop.simulator.env_id,
        "algo": options.algo,
        "seed": options.seed,
        "command": typed("d4rl"),
        "versions": versions() | loop.simulator.versions,
        "hardware": hardware("cpu"),
        "options": {"start": options.start, **to_config(options)},
    }
    rows = run_loop(
        options.out,
        loop.stages(),
        start=str(start.folder),
        rounds=options.rounds,
        settings=loop.settings,
        resume=options.resume,
        # The interval over the episodes of one policy is too narrow to tell a fall.
        early_stop=False,
        about=about,
        tell=tell,
    )
    title = f"{options.algo}, {loop.simulator.env_id}"
    show_loop(rows, title, "policy", options.out, str(start.folder))
    return rows


# ---- files


def _group(one: Round, number: int) -> Path:
    return one.folder / f"episodes-{number}.pt"


def _write(path: Path, data: TensorDictBase) -> None:
    checkpoint.write(path, dict(data.flatten_keys("/").items()))


def _read(path: Path) -> TensorDictBase:
    if not path.exists():
        raise checkpoint.CheckpointError(f"{path} is missing; {_DAMAGED}")
    content: Mapping[str, Any] = checkpoint.read(path, _DAMAGED)
    steps = len(next(iter(content.values())))
    return TensorDict(dict(content), [steps]).unflatten_keys("/")
