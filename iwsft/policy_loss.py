"""A TorchRL loss module that holds one policy and, where q lags behind it, a copy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Self

import torch
from tensordict import NestedKey, TensorDictBase, TensorDictParams, is_tensor_collection
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.objectives.common import LossModule

from iwsft.distributed import rank_and_world
from iwsft.policies.log_prob import check_apart, check_memory, takes_statistics
from iwsft.trajectory import (
    ACTION,
    ASSISTANT_MASK,
    DATA_WEIGHT,
    IMPORTANCE_WEIGHT,
    MASK,
    MULTIPLICITY,
    REF_LOG_PROB,
    STANDARD_SCORE,
    SUCCESS_RATE,
    TRAJ_IDS,
    Segments,
    fit,
    on_host,
)
from iwsft.validation import check_digits, check_links

# A prioritized replay buffer of TorchRL writes it, and TorchRL's losses multiply by it.
PRIORITY_WEIGHT = "priority_weight"
# Names that data weights may have in place of their key.
_WEIGHTS = ("data_weights", "weight", "weights")
# Usual names of masks of the steps that count, and of masks of the padding.
_MASKS = ("masks", "mask", "attention_mask", "valid")
_PADDING = ("pad_mask", "padding_mask", "action_is_pad")


@contextmanager
def holding(params: TensorDictBase, module: nn.Module) -> Iterator[None]:
    """Within, ``module`` has these parameters; after it its own again, whatever happens.

    Tensordict's own context leaves them there after an error, and makes a Ctrl-C a RuntimeError.
    """
    # A swap costs more than a small network.
    if not torch.compiler.is_compiling() and _are_own(params, module):
        yield
        return
    swap = params.to_module(module, preserve_module_state=False)
    swap.__enter__()
    try:
        yield
    finally:
        swap.__exit__(None, None, None)


def _are_own(params: TensorDictBase, module: nn.Module) -> bool:
    """Whether ``module`` has these parameters already."""
    for name, value in params.items():
        own = getattr(module, name, None)
        if isinstance(own, nn.Module) and isinstance(value, TensorDictBase):
            if not _are_own(value, own):
                return False
        elif own is not value:
            return False
    return True


def _places_of_buffers(params: TensorDictBase) -> list[int]:
    """Where each buffer is in memory; nothing while tensors have no place there."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return []
    values = params.values(True, True)
    return [value.data_ptr() for value in values if not isinstance(value, nn.Parameter)]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all of their names, those that no state has included."""
    parameters = module.named_parameters(remove_duplicate=False)
    buffers = module.named_buffers(remove_duplicate=False)
    return {name: x.detach() for name, x in (*parameters, *buffers)}


@dataclass
class Keys:
    """Keys of a batch, which ``set_keys`` of a loss can change; see :mod:`iwsft.trajectory`."""

    action: NestedKey = ACTION
    traj_ids: NestedKey = TRAJ_IDS
    ref_log_prob: NestedKey = REF_LOG_PROB
    multiplicity: NestedKey = MULTIPLICITY
    importance_weight: NestedKey = IMPORTANCE_WEIGHT
    data_weight: NestedKey = DATA_WEIGHT
    standard_score: NestedKey = STANDARD_SCORE
    success_rate: NestedKey = SUCCESS_RATE


class PolicyLoss(LossModule):
    """Holds theta, and q where it is lagged, apart from the module or in it (``functional``)."""

    tensor_keys: Keys
    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    # Only with functional=False.
    target_actor_network: TensorDictModule

    # Key and values that the last sync wrote into trajectories, until a batch is read.
    written: tuple[NestedKey, Tensor] | None
    # Whether it came with a q, loaded or copied, which a new updater would replace.
    loaded: bool
    # Whether trajectories of a batch were compared, so that the policy reads each alone.
    apart: bool

    def __init__(self, policy: nn.Module, *, lagged: bool, functional: bool) -> None:
        self._functional = functional
        super().__init__()
        self.written = None
        self.loaded = False
        self.apart = False
        self._has_buffers = next(policy.buffers(), None) is not None
        if functional:
            self.convert_to_functional(policy, "actor_network", create_target_params=lagged)
            return
        self.actor_network = policy
        if lagged:
            self.target_actor_network = deepcopy(policy).requires_grad_(False)
        self._has_update_associated["actor_network"] = not lagged

    @property
    def functional(self) -> bool:
        """Whether parameters are held apart from the module."""
        return self._functional

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the policy, too, which a functional loss holds apart."""
        super().train(mode)
        self.actor_network.train(mode)
        return self

    @contextmanager
    def network(self, *, lagged: bool = False) -> Iterator[nn.Module]:
        """The policy, ready to be called; with ``lagged`` the one with q's parameters."""
        if self.functional:
            name = "target_actor_network_params" if lagged else "actor_network_params"
            params = getattr(self, name)
            watched = self._has_buffers and not lagged
            places = _places_of_buffers(params) if watched else []
            with holding(params, self.actor_network):
                yield self.actor_network
            if watched and places != _places_of_buffers(params):
                problem = "the policy has replaced a buffer by another, which this loss alone sees"
                way_out = "pass functional=False, or write into the buffer (copy_)"
                raise ValueError(f"{problem}: {way_out}")
        else:
            yield self.target_actor_network if lagged else self.actor_network

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor of a lagged q and the one of theta that it follows, buffers included."""
        both: Iterable[tuple[Tensor, Tensor]]
        if self.functional:
            targets = self.target_actor_network_params.values(True, True)
            both = zip(targets, self.actor_network_params.values(True, True), strict=True)
        else:
            theta = _tensors(self.actor_network)
            both = ((q, theta[x]) for x, q in _tensors(self.target_actor_network).items())
        # Tied weights and modules have several names; they move once.
        moved: set[int] = set()
        for q, follows in both:
            if q.data_ptr() not in moved or q.numel() == 0:
                moved.add(q.data_ptr())
                yield q, follows

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.loaded = True

    def _check_all_read(self, batch: TensorDictBase, segments: Segments, *, found: bool) -> None:
        """Refuse a mask of the steps that the default keys leave unread: padding would count.

        ``found`` says whether the default keys name a mask; beside it only the assistant's is
        needed. Weights that differ and are not read are refused, too, as those are that undo the
        priorities of a replay buffer. So are trajectories into which a memory leaks.
        """
        check_memory(self.actor_network, batch, segments)
        present, read = set(batch.keys()), self.tensor_keys.data_weight
        # Where the key that is read is there, other names are where it came from.
        names = (PRIORITY_WEIGHT,) if read in present else (PRIORITY_WEIGHT, *_WEIGHTS)
        for name in filter(present.__contains__, names):
            weight = batch.get(name)
            one_each = isinstance(weight, Tensor) and weight.numel() == segments.shape.numel()
            if name == read or not one_each or not on_host(weight):
                continue
            if len(weight.reshape(segments.shape)[segments.valid].unique()) > 1:
                problem = f"this loss does not read the {name!r} of the batch"
                way_out = f"loss.set_keys(data_weight={name!r}) multiplies by it"
                other = f"batch.exclude({name!r}) does without"
                raise ValueError(f"{problem}: {way_out}, {other}")
        if self.loss_mask_key != "auto":
            return
        masks: list[NestedKey] = []
        for name in filter(present.__contains__, (*_MASKS, *_PADDING)):
            entry = batch.get(name)
            inside = is_tensor_collection(entry)
            entries = {(name, key): x for key, x in entry.items()} if inside else {name: entry}
            for key, x in entries.items():
                if isinstance(x, Tensor) and x.numel() == segments.shape.numel():
                    masks.append(key)
        if masks and (not found or ASSISTANT_MASK in masks):
            key = ASSISTANT_MASK if ASSISTANT_MASK in masks else masks[0]
            way_out = f"set loss.loss_mask_key = {key!r}, or None to count every step"
            if key in _PADDING:
                way_out = f"set {MASK!r} to the steps that count: ~{key}, if it marks padding"
            raise ValueError(f"the batch has masks that this loss does not read: {way_out}")

    def _check_batch(self, batch: TensorDictBase, segments: Segments, share: Tensor) -> None:
        """Refuse slices that would be read as one trajectory, see :func:`check_links`.

        Warn where a batch does not have what the last sync wrote: it comes from a copy; and where
        a layer normalises masked steps with the others.
        """
        if not on_host(share):
            return
        masks = self._has_buffers and segments.mask is not None and not bool(segments.mask.all())
        if masks and takes_statistics(self.actor_network):
            problem = "the policy normalises by the batch, masked steps included"
            way_out = "leave them out of the batch (iwsft.trajectory.pack), or call loss.eval()"
            warnings.warn(f"{problem}: {way_out}", UserWarning, stacklevel=2)
        if len(segments.shape) == 1 and not segments.single_steps and TRAJ_IDS in batch.keys(True):
            check_links(batch)
        # Sharded policies must run equally often on all processes.
        if not self.apart and rank_and_world()[1] == 1:
            with self.network() as policy:
                self.apart = check_apart(policy, batch, segments)
        if self.written is None:
            return
        key, written = self.written
        value = batch.get(key, default=None)
        if value is None or value.numel() != share.numel():
            return
        self.written = None
        counted = value.reshape(share.shape)[share > 0]
        if len(counted) and not bool((written.to(counted.device) == counted.max()).any()):
            problem = f"the batch does not have the {key!r} that the last sync wrote"
            copies = "it is older, of other data, or a copy, as replay buffers make them"
            way_out = "draw from the trajectories themselves, as TensorStorage(trajectories) does"
            warnings.warn(f"{problem}: {copies}; {way_out}", UserWarning, stacklevel=2)

    def _check_annotated(self, batch: TensorDictBase, share: Tensor, reference: Tensor) -> None:
        """Refuse steps that count where the mask of the data has kept log pi_ref from them."""
        mask = batch.get(MASK, default=None)
        if self.loss_mask_key == "auto" or mask is None or not on_host(share):
            return
        without = (share > 0) & ~fit(mask, share.shape, repr(MASK)).bool() & (reference == 0)
        if bool(without.any()):
            problem = f"this loss counts steps that {MASK!r} leaves out, which have no log pi_ref"
            way_out = f"annotate_reference(policy, trajectories.exclude({MASK!r})), or set it there"
            raise ValueError(f"{problem}: {way_out}")

    def _needed(
        self, batch: TensorDictBase, key: NestedKey, segments: Segments, how: str
    ) -> Tensor:
        value = self._entry(batch, key, segments)
        if value is None:
            raise KeyError(f"this loss needs {key!r} in the batch: {how}")
        return value

    def _entry(self, batch: TensorDictBase, key: NestedKey, segments: Segments) -> Tensor | None:
        value = batch.get(key, default=None)
        if value is None:
            return None
        value = fit(value, segments.shape, repr(key)).detach()
        if key in (self.tensor_keys.ref_log_prob, self.tensor_keys.importance_weight):
            check_digits(value, repr(key))
        return value

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a loss that was pickled or copied, with its q."""
        super().__setstate__(state)
        self.loaded = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy that trains what a copy of its policy or optimizer in ``memo`` holds."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        for params in self.children():
            if isinstance(params, TensorDictParams):
                # A TensorDict's own deepcopy clones, without looking at what is copied already.
                own = params.apply(lambda x: deepcopy(x, memo))
                memo[id(params)] = TensorDictParams(own, no_convert=True)
        copied.__setstate__(deepcopy(self.__dict__, memo))
        return copied

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of the policy; those of q follow it and are not for an optimizer."""
        if self.functional and not remove_duplicate:
            # torch.func asks so, and would leave the parameters as they are in silence.
            raise TypeError("torch.func can't replace what this loss holds: functional=False")
        # TorchRL's method does not take all arguments of torch's.
        every = nn.Module.named_parameters(self, prefix, recurse, remove_duplicate)
        for name, parameter in every:
            if not name.removeprefix(f"{prefix}.").startswith("target_"):
                yield name, parameter

    def reset_parameters_recursive(self) -> None:
        """Draw new parameters, for the policy and for a lagged q."""
        super().reset_parameters_recursive()
        # TorchRL's method knows functional networks only.
        if not self.functional:
            self.actor_network.reset_parameters_recursive()
            if hasattr(self, "target_actor_network"):
                self.target_actor_network.reset_parameters_recursive()
