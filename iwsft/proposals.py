"""How q follows the policy: hard syncs, an exponential moving average, and cached weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.objectives.utils import TargetNetUpdater

from iwsft.objective import ImportanceWeightedMLE
from iwsft.policies.log_prob import chunked_log_prob
from iwsft.weights import exponential


class _ProposalUpdater(TargetNetUpdater):
    """Common part: finds the parameters of theta and of q, in both modes of the loss.

    As with TorchRL's updaters, building one sets q to theta; load a checkpoint afterwards.
    """

    def __init__(self, loss: ImportanceWeightedMLE) -> None:
        if loss.functional and loss.proposal == "lagged":
            super().__init__(loss)
            return
        self.loss_module = loss
        self.init_()

    def init_(self) -> None:
        """Set q to theta."""
        if self.loss_module.functional and self.loss_module.proposal == "lagged":
            super().init_()
            return
        for source, target in self._pairs():
            target.copy_(source)
        self.loss_module._has_update_associated["actor_network"] = True
        self.initialized = True

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        loss = self.loss_module
        if loss.proposal != "lagged":
            return
        if loss.functional:
            # Buffers too (running statistics), which TorchRL's updaters leave behind.
            yield from zip(
                loss.actor_network_params.values(True, True),
                loss.target_actor_network_params.values(True, True),
                strict=True,
            )
            return
        source_state = loss.actor_network.state_dict(keep_vars=True)
        target_state = loss.target_actor_network.state_dict(keep_vars=True)
        # Tied weights stand under several names; they move once.
        seen: set[int] = set()
        for key, source in source_state.items():
            target = target_state[key].data
            if target.data_ptr() not in seen or target.numel() == 0:
                seen.add(target.data_ptr())
                yield source.data, target

    def state_dict(self) -> dict[str, Any]:
        """Progress that the loss does not hold: where in the window we are."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""


def _require_loss(loss: object) -> None:
    if not isinstance(loss, ImportanceWeightedMLE):
        raise TypeError(f"expected an ImportanceWeightedMLE, got {type(loss).__name__}")


class HardSync(_ProposalUpdater):
    """theta_q <- theta at every ``every``-th call of :meth:`step` (paper, Algorithm 1).

    Args:
        loss: with ``proposal="lagged"``, or with ``"cached"``: then a sync runs
            :func:`reweight` on ``trajectories``, and no q network exists.
        every: Q, the number of updates between syncs.
        trajectories: annotated trajectories whose weights are cached; needed with ``"cached"``.

    Raises:
        ValueError: ``every < 1``, a loss whose q does not follow, or cached weights without
            trajectories.
    """

    def __init__(
        self,
        loss: ImportanceWeightedMLE,
        *,
        every: int,
        trajectories: TensorDictBase | None = None,
    ) -> None:
        _require_loss(loss)
        if every < 1:
            raise ValueError(f"every={every}: a sync needs at least one update before it")
        if loss.proposal not in ("lagged", "cached"):
            raise ValueError(
                f"proposal={loss.proposal!r} has no q to sync; use 'lagged' or 'cached'"
            )
        if (loss.proposal == "cached") != (trajectories is not None):
            raise ValueError("trajectories=... goes with proposal='cached', and only with it")
        self.every = every
        self.trajectories = trajectories
        self.counter = 0
        super().__init__(loss)

    def init_(self) -> None:
        """Set q to theta; with cached weights, write the first ones."""
        super().init_()
        if self.trajectories is not None:
            reweight(self.trajectories, self.loss_module)

    @torch.no_grad()
    def step(self) -> bool:
        """Count an update, sync if it is the ``every``-th since the last; whether it did."""
        self.counter += 1
        if self.counter < self.every:
            return False
        self.counter = 0
        for source, target in self._pairs():
            target.copy_(source)
        if self.trajectories is not None:
            reweight(self.trajectories, self.loss_module)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Updates since the last sync, and the cached weights where there are any."""
        state: dict[str, Any] = {"counter": self.counter}
        if self.trajectories is not None:
            key = self.loss_module.tensor_keys.importance_weight
            state["importance_weight"] = self.trajectories.get(key).clone()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, in mid-window too."""
        self.counter = state_dict["counter"]
        if self.trajectories is not None:
            key = self.loss_module.tensor_keys.importance_weight
            self.trajectories.get(key).copy_(state_dict["importance_weight"])


class EMA(_ProposalUpdater):
    """theta_q <- decay theta_q + (1 - decay) theta at every call of :meth:`step` (Section 4.2).

    Args:
        loss: with ``proposal="lagged"``.
        decay: the paper's alpha, in [0, 1).

    Raises:
        ValueError: a decay out of range, or a loss without a lagged q.
    """

    def __init__(self, loss: ImportanceWeightedMLE, *, decay: float) -> None:
        _require_loss(loss)
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be in [0, 1)")
        if loss.proposal != "lagged":
            raise ValueError(
                f"EMA moves a lagged q, this loss has proposal={loss.proposal!r}; cached weights "
                "follow by HardSync"
            )
        self.decay = decay
        super().__init__(loss)

    @torch.no_grad()
    def step(self) -> None:
        """Move q one update towards theta."""
        sources, targets = zip(*self._pairs(), strict=True)
        floating = [i for i, t in enumerate(targets) if t.is_floating_point()]
        torch._foreach_lerp_(
            [targets[i].data for i in floating], [sources[i].data for i in floating], 1 - self.decay
        )
        for i in set(range(len(targets))) - set(floating):
            targets[i].copy_(sources[i])


@torch.no_grad()
def reweight(
    trajectories: TensorDictBase, loss: ImportanceWeightedMLE, *, rows: int = 8192
) -> Tensor:
    """Write the weights of the present policy into the trajectories: a sync without a q network.

    One forward sweep; transforms that look at a batch (self-normalisation, target ESS) see all
    trajectories, each counted by its multiplicity.

    Args:
        trajectories: the training trajectories, with ``ref_log_prob``; ``importance_weight`` (per
            step, its trajectory's value) is written in place.
        loss: whose policy, keys and transforms are used, whatever its proposal.
        rows: steps per forward pass.

    Returns:
        The log-weights per step, in the layout of the trajectories.
    """
    segments = loss.segments(trajectories)
    with loss.network() as policy:
        log_q = chunked_log_prob(policy, trajectories, rows=rows, segments=segments)
    log_weight, _ = loss.weigh(trajectories, log_q, segments=segments)
    weight = exponential(log_weight)
    key = loss.tensor_keys.importance_weight
    stored = trajectories.get(key, default=None)
    if stored is None:
        trajectories.set(key, weight)
    else:
        # In place: samplers refer to this tensor.
        stored.copy_(weight)
    return log_weight
