"""An online run of SAC (https://arxiv.org/abs/1812.05905) whose whole replay is the dataset.

Two layers of 256 units each, two Q-networks, learned temperature with the target entropy -act,
one update of 256 transitions per step, one Adam for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal
from torchrl.objectives import SACLoss, SoftUpdate

from baselines.critics import STATE_ACTION_VALUE, qvalue_networks, values
from benchmarks.collect.options import Options
from benchmarks.collect.output import Fields, Output, Parts
from benchmarks.collect.rollout import Instance, Simulator
from iwsft import checkpoint
from iwsft.evaluation import episode_seeds
from iwsft.metrics import MetricsLog
from iwsft.policies.linear import mlp
from iwsft.progress import Progress
from iwsft.trajectory import ACTION, DONE, NEXT_OBSERVATION, OBSERVATION, REWARD, TERMINATED

# Folder of the policy within the folder of the run.
POLICY = "policy"
_HIDDEN = (256, 256)
_LAST_EPISODES = 10
_CURVE_POINTS = 400


@dataclass(frozen=True)
class Settings:
    """Settings of a run; the defaults are those of D4RL's medium-replay sets."""

    steps: int = 400_000  # of the environment
    random_steps: int = 10_000  # first steps, with uniform actions and no updates
    batch_size: int = 256  # transitions of an update
    lr: float = 3e-4  # of Adam, for all networks and the temperature
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # share of the Q-networks in their targets' moving average


class _SACLoss(SACLoss):
    """TorchRL's loss with both Q-networks in one call: the same numbers, faster."""

    def _make_vmap(self) -> None:
        def both(inputs: TensorDictBase, params: TensorDictParams) -> TensorDictBase:
            value = values(self.qvalue_network, inputs, params).unsqueeze(-1)
            return TensorDict({STATE_ACTION_VALUE: value}, value.shape[:-1])

        self._vmap_qnetworkN0: Callable[..., TensorDictBase] = both


class SAC:
    """Networks, targets and optimizer of SAC, of the environment's sizes and bounds."""

    def __init__(self, simulator: Simulator, settings: Settings) -> None:
        actions = len(simulator.low)
        low, high = torch.from_numpy(simulator.low), torch.from_numpy(simulator.high)
        self.actor = actor(simulator.observation_dim, low, high)
        qvalues = qvalue_networks(simulator.observation_dim, actions, _HIDDEN)
        self.loss = _SACLoss(
            self.actor, qvalues, loss_function="l2", target_entropy=-float(actions)
        )
        self.loss.make_value_estimator(gamma=settings.gamma)
        # It copies the networks into their targets, so a checkpoint must be loaded after it.
        self.updater = SoftUpdate(self.loss, tau=settings.tau)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=settings.lr, fused=True)

    def act(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        """Draw an action for one observation."""
        batch = TensorDict({OBSERVATION: torch.from_numpy(observation).unsqueeze(0)}, [1])
        with torch.no_grad():
            return self.actor(batch)[ACTION][0].numpy()

    def update(self, batch: TensorDictBase) -> TensorDictBase:
        """Update all networks, then the targets; return the losses and diagnostics."""
        out = self.loss(batch)
        self.optimizer.zero_grad()
        (out["loss_actor"] + out["loss_qvalue"] + out["loss_alpha"]).backward()
        self.optimizer.step()
        self.updater.step()
        return out.detach()


class Replay:
    """All transitions, each in one row, so that a batch takes one look-up."""

    def __init__(self, capacity: int, observation_dim: int, action_dim: int) -> None:
        self._widths = [observation_dim, action_dim, 1, 1, observation_dim]
        self._rows = torch.empty(capacity, sum(self._widths))
        self._size = 0

    def extend(self, *columns: NDArray[Any]) -> None:
        """Add transitions: observations, actions, rewards, terminals, next observations."""
        rows = np.concatenate(
            [np.asarray(column, np.float32).reshape(len(columns[0]), -1) for column in columns], 1
        )
        self._rows[self._size : self._size + len(rows)] = torch.from_numpy(rows)
        self._size += len(rows)

    def sample(self, batch_size: int) -> TensorDict:
        """Draw transitions uniformly, with replacement, from torch's generator."""
        index = torch.randint(self._size, (batch_size,))
        columns = self._rows.index_select(0, index).split(self._widths, 1)
        names = (OBSERVATION, ACTION, REWARD, TERMINATED, NEXT_OBSERVATION)
        batch = TensorDict(dict(zip(names, columns, strict=True)), [batch_size])
        # Only a terminal stops the bootstrap; after a timeout the episode could continue.
        terminated = batch[TERMINATED].bool()
        return batch.set(TERMINATED, terminated).set(DONE, terminated)


def actor(observation_dim: int, low: Tensor, high: Tensor) -> ProbabilisticActor:
    """Return a tanh-normal policy within the bounds, mean and scale from one network."""
    layers = mlp(observation_dim, 2 * len(low), _HIDDEN, nn.Linear)
    net = nn.Sequential(layers, NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=[OBSERVATION], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        out_keys=[ACTION],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": low, "high": high},
        return_log_prob=True,
    )


def save_policy(folder: Path, learner: SAC, simulator: Simulator) -> None:
    """Write the actor for :func:`load_policy`."""
    content = {
        "env_id": simulator.env_id,
        "env_kwargs": simulator.kwargs,
        "observation_dim": simulator.observation_dim,
        "low": torch.from_numpy(simulator.low),
        "high": torch.from_numpy(simulator.high),
        "parameters": learner.actor.state_dict(),
    }
    checkpoint.save(folder / POLICY, content, {})


def load_policy(folder: Path) -> tuple[ProbabilisticActor, str, dict[str, Any]]:
    """Return the policy of a finished run, and id and arguments of its environment."""
    content = checkpoint.load(folder / POLICY, {})
    if content is None:
        raise FileNotFoundError(f"no policy in {folder / POLICY}; the run is not finished")
    policy = actor(content["observation_dim"], content["low"], content["high"])
    policy.load_state_dict(content["parameters"])
    return policy, content["env_id"], content["env_kwargs"]


def settings_of(options: Options) -> Settings:
    """Settings of a command line's run."""
    steps = options.steps[0] if options.steps else Settings.steps
    return Settings(steps, options.random_steps)


def source_of(options: Options, episodes: int | None) -> dict[str, Any]:
    """The source of a command line's data; the number of episodes is None where it is not known."""
    return {"policy": "online SAC run", "episodes": episodes, **asdict(settings_of(options))}


@dataclass
class OnlineRun:
    """SAC in one environment, each transition recorded.

    Checkpoints are made only at ends of episodes: the state of a simulator cannot be restored
    exactly, but an episode starts from its seed, which depends on its number. So a run that was cut
    off repeats what came after its last checkpoint and ends in the same data, bit for bit.
    """

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
        self.settings = settings_of(self.options)
        torch.manual_seed(self.options.seed)
        self._checkpoint = self.output.partial / checkpoint.FOLDER
        self._seeds = episode_seeds(self.options.seed, self.settings.steps)
        self._learner = SAC(self.simulator, self.settings)
        actions = len(self.simulator.low)
        self._replay = Replay(self.settings.steps, self.simulator.observation_dim, actions)
        state = checkpoint.load(self._checkpoint, {})
        self.parts.keep(0 if state is None else state["parts"])
        if state is not None:
            self._restore(state)

    def collect(self, bar: Progress) -> tuple[list[dict[str, Any]], str]:
        """Run to the end; return the source of the data, and lines on its cost and its folder."""
        env, before, since = self.simulator.make(), self.steps, time.perf_counter()
        every = max(1, self.settings.steps // _CURVE_POINTS)
        task = bar.add_task("sac", total=self.settings.steps, completed=before)
        with env.env:
            log = MetricsLog(self.output.run, after=self.steps)
            while self.steps < self.settings.steps:
                self._episode(env, log, every)
                speed = (self.steps - before) / (time.perf_counter() - since)
                mean = f"return {np.mean(self._returns):.1f}"
                note = f"episode {self.episodes}, {mean}, {speed:.0f}/s"
                bar.update(task, completed=self.steps, note=note)
        save_policy(self.output.run, self._learner, self.simulator)
        source = source_of(self.options, self.episodes)
        cost = f"; {1000 * self.cpu_seconds / self.steps:.1f} CPU-ms per step"
        return [source], f"{cost}\nlearning curve and policy in {self.output.run}"

    def _episode(self, env: Instance, log: MetricsLog, every: int) -> None:
        """Run one episode, or its first steps if the run ends before."""
        since = time.process_time()
        env.reset(self._seeds[self.episodes])
        ended = False
        low, high = self.simulator.low, self.simulator.high
        while not ended and self.steps < self.settings.steps:
            random = self.steps < self.settings.random_steps
            if random:
                action = low + (high - low) * torch.rand(len(low)).numpy()
            else:
                action = self._learner.act(env.observation)
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
                    now = {"step": self.steps, "episodes": self.episodes, "return_mean": mean}
                    log.write(now | row | {"cpu_seconds": spent})
        episode = env.episode(cut=not ended)
        self._unwritten.append(episode)
        self._returns.append(float(episode["rewards"].sum(dtype=np.float64)))
        self._returns = self._returns[-_LAST_EPISODES:]
        self.episodes += 1
        self.cpu_seconds += time.process_time() - since
        unwritten = sum(len(part["rewards"]) for part in self._unwritten)
        if unwritten >= self.options.part_steps or self.steps == self.settings.steps:
            self._save()

    def _save(self) -> None:
        """Write the part first, then the checkpoint that counts it."""
        self.parts.append(self._unwritten, {})
        self._unwritten = []
        state = {
            "loss": self._learner.loss.state_dict(),
            "optimizer": self._learner.optimizer.state_dict(),
            "draws": torch.get_rng_state(),
            "parts": len(self.parts),
            "steps": self.steps,
            "episodes": self.episodes,
            "returns": self._returns,
            "cpu_seconds": self.cpu_seconds,
        }
        checkpoint.save(self._checkpoint, state, {})

    def _restore(self, state: dict[str, Any]) -> None:
        self._learner.loss.load_state_dict(state["loss"])
        self._learner.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.episodes = state["steps"], state["episodes"]
        self._returns, self.cpu_seconds = state["returns"], state["cpu_seconds"]
        fields = self.parts.fields()
        columns = ("observations", "actions", "rewards", "terminals", "next_observations")
        self._replay.extend(*(fields[name] for name in columns))
        torch.set_rng_state(state["draws"])

    def _check_finite(self, values: NDArray[Any] | float) -> None:
        if not np.isfinite(values).all():
            way_out = "look at the rewards of the environment, or choose another --seed"
            raise FloatingPointError(f"SAC has diverged at step {self.steps}; {way_out}")
