"""An online run of SAC whose whole replay is the dataset."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress

from benchmarks.collect import sac
from benchmarks.collect.options import Options
from benchmarks.collect.output import Fields, Output, Parts
from benchmarks.collect.simulator import Instance, Simulator
from iwsft import checkpoint
from iwsft.evaluation import episode_seeds
from iwsft.metrics import MetricsLog

# Reports the numbers of steps and episodes so far, and the mean return of the last episodes.
Report = Callable[[int, int, float], None]
_LAST_EPISODES = 10
_CURVE_POINTS = 400


def collect_replay(run: OnlineRun, bar: Progress) -> tuple[list[dict[str, Any]], str]:
    """Run SAC to its end; return the source of the data, and lines on its cost and its folder."""
    steps_before, since = run.steps, time.perf_counter()
    task = bar.add_task("sac", total=run.settings.steps, completed=run.steps, note="")

    def report(steps: int, episodes: int, mean: float) -> None:
        speed = (steps - steps_before) / (time.perf_counter() - since)
        note = f"episode {episodes}, return {mean:.1f}, {speed:.0f}/s"
        bar.update(task, completed=steps, note=note)

    run.train(report)
    source = {"policy": "online SAC run", "episodes": run.episodes, **asdict(run.settings)}
    cost = f"; {1000 * run.cpu_seconds / run.steps:.1f} CPU-ms per step"
    return [source], f"{cost}\nlearning curve and policy in {run.output.run}"


@dataclass
class OnlineRun:
    """SAC in one environment, each transition recorded.

    Checkpoints are made only at ends of episodes: the state of a simulator cannot be restored
    exactly, but an episode starts from its seed, which depends on its number. So a run that was cut
    off repeats what came after its last checkpoint and ends in the same data, bit for bit.

    The folders of ``output`` get the checkpoint, the learning curve and the policy. Of the command
    line, the seed and the steps between checkpoints are used.
    """

    settings: sac.Settings
    simulator: Simulator
    parts: Parts
    output: Output
    options: Options
    steps: int = 0
    episodes: int = 0
    cpu_seconds: float = 0.0
    _unwritten: list[Fields] = field(default_factory=list)
    _returns: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.options.seed)
        self._checkpoint = self.output.partial / checkpoint.FOLDER
        self._seeds = episode_seeds(self.options.seed, self.settings.steps)
        self._learner = sac.SAC(self.simulator, self.settings)
        actions = len(self.simulator.low)
        self._replay = sac.Replay(self.settings.steps, self.simulator.observation_dim, actions)
        state = checkpoint.load(self._checkpoint, {})
        self.parts.keep(0 if state is None else state["parts"])
        if state is not None:
            self._restore(state)

    def train(self, report: Report) -> None:
        """Run to the end, see :func:`collect_replay`."""
        env = self.simulator.make()
        every = max(1, self.settings.steps // _CURVE_POINTS)
        try:
            with MetricsLog(self.output.run, after=self.steps) as log:
                while self.steps < self.settings.steps:
                    self._episode(env, log, every)
                    report(self.steps, self.episodes, float(np.mean(self._returns)))
        finally:
            env.env.close()
        sac.save_policy(self.output.run, self._learner, self.simulator)

    def _episode(self, env: Instance, log: MetricsLog, every: int) -> None:
        """Run one episode, or its first steps if the run ends before."""
        since = time.process_time()
        env.reset(self._seeds[self.episodes])
        ended = False
        while not ended and self.steps < self.settings.steps:
            now = env.observation
            random = self.steps < self.settings.random_steps
            action = self._uniform() if random else self._learner.act(now)
            self._check_finite(action)
            ended, _ = env.step(action)
            self._replay.extend(*env.transition())
            self.steps += 1
            if not random:
                out = self._learner.update(self._replay.sample(self.settings.batch_size))
                if self.steps % every == 0:
                    row = {name: float(value) for name, value in out.items()}
                    self._check_finite(row["loss_qvalue"])
                    mean = float(np.mean(self._returns)) if self._returns else float("nan")
                    spent = self.cpu_seconds + time.process_time() - since
                    log.write(
                        {"step": self.steps, "episodes": self.episodes, "return_mean": mean}
                        | row
                        | {"cpu_seconds": spent}
                    )
        episode = env.episode(cut=not ended)
        self._unwritten.append(episode)
        self._returns.append(float(episode["rewards"].sum(dtype=np.float64)))
        self._returns = self._returns[-_LAST_EPISODES:]
        self.episodes += 1
        self.cpu_seconds += time.process_time() - since
        unwritten = sum(len(part["rewards"]) for part in self._unwritten)
        if unwritten >= self.options.part_steps or self.steps == self.settings.steps:
            self._save()

    def _uniform(self) -> Any:
        low, high = self.simulator.low, self.simulator.high
        return low + (high - low) * torch.rand(len(low)).numpy()

    def _save(self) -> None:
        """Write the part first, then the checkpoint that counts it."""
        self.parts.append(self._unwritten, {})
        self._unwritten = []
        state = {
            "learner": self._learner.state_dict(),
            "draws": torch.get_rng_state(),
            "parts": len(self.parts),
            "steps": self.steps,
            "episodes": self.episodes,
            "returns": self._returns,
            "cpu_seconds": self.cpu_seconds,
        }
        checkpoint.save(self._checkpoint, state, {})

    def _restore(self, state: dict[str, Any]) -> None:
        self._learner.load_state_dict(state["learner"])
        self.steps, self.episodes = state["steps"], state["episodes"]
        self._returns, self.cpu_seconds = state["returns"], state["cpu_seconds"]
        fields = self.parts.fields()
        columns = ("observations", "actions", "rewards", "terminals", "next_observations")
        self._replay.extend(*(fields[name] for name in columns))
        torch.set_rng_state(state["draws"])

    def _check_finite(self, values: NDArray[Any] | float) -> None:
        if np.isfinite(values).all():
            return
        raise FloatingPointError(
            f"SAC has diverged at step {self.steps}: its actions or its loss are not finite; look "
            "at the rewards of the environment, or choose another --seed. The last checkpoint "
            "is kept"
        )
