"""How q follows the policy: hard syncs, an exponential moving average, and cached weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.objectives.utils import TargetNetUpdater

from iwsft.chain import Weights
from iwsft.forward_pass import ForwardPass
from iwsft.objective import ImportanceWeightedMLE
from iwsft.trajectory import Segments
from iwsft.validation import check_count, check_digits, check_tensordict
from iwsft.weights import check_number, exponential


class Holder(Protocol):
    """Holds the tensors of q: the loss itself, or the shards of an engine."""

    def pairs(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Each tensor of q and the tensor of theta that it follows."""


class _Updater(TargetNetUpdater):
    """Moves the pairs of a holder; like TorchRL's updaters, building one sets q to theta."""

    proposals: ClassVar[tuple[str, ...]] = ("lagged",)
    # Whether it can move a reference, too.
    reannotates: ClassVar[bool] = False

    def __init__(
        self,
        loss: ImportanceWeightedMLE,
        holder: Holder | None,
        trajectories: TensorDictBase | None = None,
    ) -> None:
        name = type(self).__name__
        if not isinstance(loss, ImportanceWeightedMLE):
            raise TypeError(f"{name} needs an ImportanceWeightedMLE, not a {type(loss).__name__}")
        self.moves_reference = loss.importance_weights.reference == "synced"
        if loss.proposal not in self.proposals and not (self.moves_reference and self.reannotates):
            allowed = " or ".join(map(repr, self.proposals))
            raise ValueError(f"{name} needs proposal={allowed}, not proposal={loss.proposal!r}")
        if (loss.proposal == "cached" or self.moves_reference) != (trajectories is not None):
            who = "proposal='cached' or reference='synced'"
            raise ValueError(f"trajectories=... goes with {who}, and only with it")
        if loss.proposal == "lagged" and loss.reads_weights and holder is None:
            raise ValueError("this loss does not hold its q (hold_q=False): pass holder=...")
        self.loss_module = loss
        self.holder: Holder = loss if holder is None else holder
        self.trajectories = trajectories
        # TorchRL warns of a q that is read before this is set.
        loss._has_update_associated["actor_network"] = True
        if loss.loaded and loss.has_lagged_q and any((a != b).any() for a, b in loss.pairs()):
            problem = f"{name} sets q to the policy, so the q that this loss came with is lost"
            way_out = f"make {name} first, then load the state of the loss"
            warnings.warn(f"{problem}; to continue with it, {way_out}", UserWarning, stacklevel=3)
        self.init_()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(proposal={self.loss_module.proposal!r})"

    @torch.no_grad()
    def init_(self) -> None:
        """Set q to theta."""
        if self.loss_module.proposal == "lagged":
            for q, theta in self.holder.pairs():
                q.copy_(theta)

    def state_dict(self) -> dict[str, Any]:
        """Progress that the holder does not have: the position in the window."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""


class HardSync(_Updater):
    """theta_q <- theta at every ``every``-th call of :meth:`step` (paper, Algorithm 1).

    TorchRL's ``HardUpdate`` with an interval of N does so at every N + 1st call.

    Args:
        loss: Loss with ``proposal="lagged"``, or with ``"cached"``: then a sync runs
            :func:`reweight` on ``trajectories``. With ``reference="synced"`` it writes log p into
            their ``ref_log_prob``.
        every: Q, the number of updates between syncs.
        trajectories: Trajectories of the training, needed in the latter two cases.
        holder: Holder of a lagged q, if that is not the loss.
    """

    proposals = ("lagged", "cached")
    reannotates = True

    def __init__(
        self,
        loss: ImportanceWeightedMLE,
        *,
        every: int,
        trajectories: TensorDictBase | None = None,
        holder: Holder | None = None,
    ) -> None:
        check_count("every", every)
        self.every = every
        self.counter = 0
        super().__init__(loss, holder, trajectories)

    def init_(self) -> None:
        """Set q, or the reference, to theta; with cached weights, write the first ones."""
        super().init_()
        if self.moves_reference:
            assert self.trajectories is not None
            _write(self.trajectories, self.key, _log_prob(self.trajectories, self.loss_module))
            self.loss_module.awaits_sync = False
        elif self.trajectories is not None:
            reweight(self.trajectories, self.loss_module)
        self._tell_loss()

    def step(self) -> bool:
        """Count an update; sync at the ``every``-th since the last sync, and return whether."""
        self.counter += 1
        if self.counter < self.every:
            return False
        self.counter = 0
        self.init_()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Updates since the last sync, and what it wrote into the trajectories."""
        state: dict[str, Any] = {"counter": self.counter}
        if self.trajectories is not None:
            state[self._entry] = self.trajectories.get(self.key).clone()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, also in the middle of a window."""
        if self.trajectories is not None:
            stored, present = state_dict[self._entry], self.trajectories.get(self.key)
            if stored.shape != present.shape:
                problem = f"this state is of trajectories {list(stored.shape)}"
                way_out = "resume with the trajectories of the first run"
                raise ValueError(f"{problem}, and these are {list(present.shape)}; {way_out}")
            _write(self.trajectories, self.key, stored)
        self.counter = state_dict["counter"]
        self._tell_loss()

    def _tell_loss(self) -> None:
        """Tell the loss what its next batch must hold."""
        if self.trajectories is not None:
            self.loss_module.written = (self.key, self.trajectories.get(self.key))

    @property
    def _entry(self) -> str:
        """What a sync writes into the trajectories."""
        return "ref_log_prob" if self.moves_reference else "importance_weight"

    @property
    def key(self) -> NestedKey:
        """Key of what a sync writes into the trajectories."""
        return getattr(self.loss_module.tensor_keys, self._entry)


class EMA(_Updater):
    """theta_q <- decay theta_q + (1 - decay) theta at every call of :meth:`step` (Section 4.2).

    Args:
        loss: Loss with ``proposal="lagged"``.
        decay: The paper's alpha, in [0, 1).
        holder: Holder of q, if that is not the loss.
    """

    def __init__(
        self, loss: ImportanceWeightedMLE, *, decay: float, holder: Holder | None = None
    ) -> None:
        check_number(f"decay={decay!r}", decay)
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be in [0, 1)")
        self.decay = decay
        super().__init__(loss, holder)
        if any(q.is_floating_point() and q.itemsize < 4 for q, _ in self.holder.pairs()):
            way_out = "hold the policy in float32 and run it under torch.autocast"
            problem = f"q has half precision, which rounds away what a decay of {decay} moves it by"
            warnings.warn(f"{problem}: {way_out}", UserWarning, stacklevel=2)

    @torch.no_grad()
    def step(self) -> None:
        """Move q one update towards theta."""
        alike: list[tuple[Tensor, Tensor]] = []
        for q, theta in self.holder.pairs():
            if not q.is_floating_point():
                q.copy_(theta)
            elif q.dtype == theta.dtype and q.device == theta.device:
                alike.append((q.data, theta.data))
            else:
                q.lerp_(theta.to(q), 1 - self.decay)
        if alike:
            qs, thetas = zip(*alike, strict=True)
            torch._foreach_lerp_(qs, thetas, 1 - self.decay)


def reweight(
    trajectories: TensorDictBase, loss: ImportanceWeightedMLE, *, rows: int = 8192
) -> Tensor:
    """Write the weights of the present policy into the trajectories: a sync without a q network.

    The policy runs forward over all trajectories once, see :func:`write_weights` for the rest.

    Args:
        trajectories: Training trajectories, with ``ref_log_prob``.
        loss: Loss whose policy, keys and transforms are used, whatever its proposal is.
        rows: Steps of a forward pass.

    Returns:
        Log-weights per step, in the layout of the trajectories.
    """
    check_tensordict(trajectories)
    segments = loss.segments(trajectories)
    log_q = _log_prob(trajectories, loss, rows=rows)
    return write_weights(trajectories, loss, log_q, segments=segments).log_weight


def write_weights(
    trajectories: TensorDictBase,
    loss: ImportanceWeightedMLE,
    log_q: Tensor,
    *,
    segments: Segments | None = None,
    share: Tensor | None = None,
) -> Weights:
    """Write ``importance_weight`` (per step, its trajectory's value) into the trajectories.

    Transforms that compare weights (self-normalisation, target ESS) see all of the trajectories,
    each counted by its multiplicity. The arguments are those of ``loss.weigh``.
    """
    weights = loss.weigh(trajectories, log_q, segments=segments, share=share)
    _write(trajectories, loss.tensor_keys.importance_weight, exponential(weights.log_weight))
    return weights


def _log_prob(
    trajectories: TensorDictBase, loss: ImportanceWeightedMLE, *, rows: int = 8192
) -> Tensor:
    """log p of each step under the present policy."""
    segments = loss.segments(trajectories)
    with loss.network() as policy:
        return ForwardPass(policy, trajectories, rows=rows, segments=segments).log_prob()


def _write(trajectories: TensorDictBase, key: NestedKey, value: Tensor) -> None:
    stored = trajectories.get(key, default=None)
    if stored is None:
        if trajectories.is_locked:
            raise ValueError("the trajectories are locked: call trajectories.unlock_()")
        trajectories.set(key, value)
        return
    check_digits(stored, repr(key))
    # In place: samplers refer to this tensor.
    trajectories.set_(key, value.reshape(stored.shape))
