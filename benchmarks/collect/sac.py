"""Soft actor-critic (https://arxiv.org/abs/1812.05905) with TorchRL's loss: networks and updates.

Two layers of 256 units each, two Q-networks, learned temperature with the target entropy -act,
one update of 256 transitions per step, one Adam for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal
from torchrl.objectives import SACLoss, SoftUpdate

from baselines.critics import STATE_ACTION_VALUE, qvalue_networks, values
from benchmarks.collect.simulator import Simulator
from iwsft import checkpoint
from iwsft.trajectory import ACTION, DONE, NEXT_OBSERVATION, OBSERVATION, REWARD, TERMINATED

# Folder of the policy within the folder of the run.
POLICY = "policy"
_HIDDEN = (256, 256)


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
    """TorchRL's loss with both Q-networks in one batched product: the same numbers, faster."""

    def _make_vmap(self) -> None:
        def both(inputs: TensorDictBase, params: TensorDictParams) -> TensorDictBase:
            value = values(self.qvalue_network, inputs, params).unsqueeze(-1)
            return TensorDict({STATE_ACTION_VALUE: value}, value.shape[:-1])

        self._vmap_qnetworkN0: Callable[..., TensorDictBase] = both


class SAC:
    """Networks, targets and optimizer of SAC, of the environment's sizes and bounds."""

    def __init__(self, simulator: Simulator, settings: Settings) -> None:
        actions = len(simulator.low)
        self.actor = actor(
            simulator.observation_dim,
            torch.from_numpy(simulator.low),
            torch.from_numpy(simulator.high),
        )
        self.loss = _SACLoss(
            self.actor,
            qvalue_networks(simulator.observation_dim, actions, _HIDDEN),
            loss_function="l2",
            target_entropy=-float(actions),
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

    def state_dict(self) -> dict[str, Any]:
        """Return everything that an update changes."""
        return {"loss": self.loss.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])


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
        now, action, reward, terminal, then = columns
        terminated = terminal.bool()
        batch = TensorDict({OBSERVATION: now, ACTION: action}, [batch_size])
        batch.set(REWARD, reward).set(NEXT_OBSERVATION, then)
        # Only a terminal stops the bootstrap; after a timeout the episode could continue.
        return batch.set(TERMINATED, terminated).set(DONE, terminated)


def actor(observation_dim: int, low: Tensor, high: Tensor) -> ProbabilisticActor:
    """Return a tanh-normal policy within the bounds, mean and scale from one network."""
    net = nn.Sequential(
        MLP(
            in_features=observation_dim,
            out_features=2 * len(low),
            num_cells=list(_HIDDEN),
            activation_class=nn.ReLU,
            activation_kwargs={"inplace": True},
        ),
        NormalParamExtractor(),
    )
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
