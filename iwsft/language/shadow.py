"""q as an exponential moving average of theta, kept shard by shard beside a model of any size."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iwsft.checkpoint import CheckpointError
from iwsft.language.ranks import rank_and_world

# Bytes that go into one all-reduce, unless a single parameter has more.
_BUCKET = 2**28


class Shadow:
    """theta_q <- decay theta_q + (1 - decay) theta at every :meth:`step`; starts equal to theta.

    The average is kept in float32 (float64 for float64 parameters): in bfloat16 most of it would
    never move. Each rank keeps the average of what it holds of the trainable parameters, and no
    step gathers anything:

    - a plain module, or one replicated (``DistributedDataParallel``, ZeRO-0): all of it;
    - DeepSpeed ZeRO-1 and 2: its partition of the float32 master;
    - DeepSpeed ZeRO-3: its shard, theta taken from the float32 master, on the master's device
      (the host with ``offload_optimizer``);
    - FSDP2: its local shard, on the shard's device.

    So the cost is 4 bytes a trainable parameter (with LoRA those of the adapters alone), divided
    by the number of ranks where the engine divides. Within :meth:`swapped` a copy of this rank's
    shard in the parameters' dtype comes on top.

    Frozen parameters and buffers are not averaged: q uses theta's, running statistics included.

    Args:
        model: the model as the engine returned it, or the module within; make the shadow after
            the engine (``accelerator.prepare``, ``deepspeed.initialize``, ``fully_shard``).
        decay: the paper's alpha, in [0, 1).
        optimizer: accelerate's, which knows when it skipped an update (gradients that overflowed
            float16): then :meth:`step` does not move q either.

    Raises:
        ValueError: a decay out of range, or no trainable parameter.
        NotImplementedError: parameters or optimizer states on NVMe, ZeRO++'s second copies of the
            shards, or FSDP1.
        RuntimeError: ZeRO-3 parameters that no optimizer looks after yet.
    """

    def __init__(self, model: nn.Module, *, decay: float, optimizer: Any = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be in [0, 1)")
        self.model = model
        self.decay = decay
        self._optimizer = optimizer
        self._in_place = False
        _release_gathered(model)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError(
                f"{type(model).__name__} has no trainable parameter, so q would never move; make "
                "the shadow while theta's parameters have requires_grad=True"
            )
        _refuse(model, parameters)
        self._shadow: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            theta = _Part.of(parameter).theta
            dtype = torch.promote_types(theta.dtype, torch.float32)
            self._shadow[name] = theta.to(dtype, copy=True)

    @torch.no_grad()
    def step(self) -> None:
        """Move q one update towards theta; call after each step of the optimizer.

        Raises:
            RuntimeError: within :meth:`swapped`, or the model was sharded after the shadow was
                made.
        """
        if self._in_place:
            raise RuntimeError("the parameters are q's within swapped(): step after it")
        if getattr(self._optimizer, "step_was_skipped", False):
            return
        for name, part in self._parts().items():
            q = self._shadow[name]
            q.lerp_(part.theta.to(q), 1 - self.decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within, the model's parameters are q, cast to their dtype; after, theta bit for bit.

        No gradient is recorded within, and nothing within may change parameters. Use it between
        updates. Whole copies of parameters that an engine holds (ZeRO-3's persistent and
        prefetched ones, FSDP2's without reshard after forward) are let go on the way in and out;
        the next forward gathers them anew. Under ZeRO-1 and 2 all ranks exchange their partitions
        on the way in and out, so all must come here together.

        After an exception within, theta is back as well; an FSDP2 forward that broke off is reset,
        where torch can (``FSDPModule.reset_iter_state``).

        Raises:
            RuntimeError: within another :meth:`swapped`, or the model was sharded after the shadow
                was made.
        """
        if self._in_place:
            raise RuntimeError("swapped() within swapped(): the parameters are q's already")
        parts = self._parts()
        theta = {name: part.held.clone() for name, part in parts.items()}
        self._in_place = True
        try:
            _write(parts, self._shadow)
            with torch.no_grad():
                yield
        except BaseException:
            _reset_broken_forward(self.model)
            raise
        finally:
            try:
                _release_gathered(self.model)
            finally:
                _write(parts, theta)
                self._in_place = False

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of q (not copied), with the rank and world size it belongs to."""
        rank, world_size = rank_and_world()
        return {"rank": rank, "world_size": world_size, "shadow": dict(self._shadow)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict` of the same rank of the same engine.

        Raises:
            CheckpointError: of another world size or rank, of other parameters, or of shards of
                other shapes; nothing has been changed then.
        """
        rank, world_size = rank_and_world()
        for name, here in (("world_size", world_size), ("rank", rank)):
            stored = state_dict.get(name)
            if stored != here:
                raise CheckpointError(
                    f"the shadow of q was saved with {name}={stored}, here it is {here}: resume "
                    "with the number of processes it was saved with, each rank its own part"
                )
        saved: Mapping[str, Tensor] = state_dict["shadow"]
        differ = sorted(saved.keys() ^ self._shadow.keys())
        if differ:
            raise CheckpointError(
                f"the shadow of q was saved for other trainable parameters; {differ[0]!r} is "
                f"{'not in it' if differ[0] in self._shadow else 'not in this model'}"
            )
        for name, q in self._shadow.items():
            if saved[name].shape != q.shape:
                raise CheckpointError(
                    f"the saved shadow of {name!r} has shape {list(saved[name].shape)} on rank "
                    f"{rank}, here it is {list(q.shape)}: resume with the model, engine and "
                    "stage it was saved with"
                )
        for name, q in self._shadow.items():
            q.copy_(saved[name])

    def _parts(self) -> dict[str, _Part]:
        """What this rank holds of the shadowed parameters, no gathered copies left around."""
        _release_gathered(self.model)
        parameters = dict(self.model.named_parameters())
        parts = {}
        for name, q in self._shadow.items():
            parts[name] = part = _Part.of(parameters[name])
            if part.held.shape != q.shape:
                raise RuntimeError(
                    f"{name!r} has shape {list(part.held.shape)} on this rank, its shadow has "
                    f"{list(q.shape)}: make the shadow after the engine has sharded the model, "
                    "and use it between updates"
                )
        return parts


class _Replica(NamedTuple):
    """Where a rank's piece belongs in a parameter that all ranks hold whole (ZeRO-1, 2).

    Attributes:
        whole: the parameter, flat.
        start: the entry of ``whole`` at which the piece begins.
        group: who holds copies of ``whole``.
    """

    whole: Tensor
    start: int
    group: Any


class _Part(NamedTuple):
    """What this rank looks after of a parameter.

    Attributes:
        held: in the parameter's dtype, what the engine computes with; written when q is swapped in.
        theta: its float32 master where the engine has one, else ``held``.
        replica: where ``held`` belongs, when other ranks have copies of it.
    """

    held: Tensor
    theta: Tensor
    replica: _Replica | None = None

    @classmethod
    def of(cls, parameter: Any) -> _Part:
        if hasattr(parameter, "ds_tensor"):
            engine, held = parameter._z3_optimizer, parameter.ds_tensor.data
            place = engine.grad_position.get(engine.get_param_id(parameter))
            if place is None:
                return cls(held, held)
            # What safe_get_local_fp32_param gives, without its copy off the host.
            group, offset, number = place
            return cls(held, engine.fp32_partitioned_groups_flat[group].data[offset:][:number])
        if hasattr(parameter, "_hp_mapping"):
            whole, fragment = parameter.data.view(-1), parameter._hp_mapping
            if fragment is None:
                return cls(whole[:0], whole[:0], _Replica(whole, 0, parameter._dp_group))
            start, number = fragment.lp_fragment_address.start, fragment.lp_fragment_address.numel
            replica = _Replica(whole, start, parameter._dp_group)
            return cls(whole[start:][:number], fragment.hp_fragment.data, replica)
        held = parameter.data
        if hasattr(held, "to_local"):
            # A DTensor: FSDP2, tensor parallelism.
            held = held.to_local()
        return cls(held, held)


@torch.no_grad()
def _write(parts: Mapping[str, _Part], values: Mapping[str, Tensor]) -> None:
    """Make these the model's parameters, on all ranks."""
    for name, part in parts.items():
        part.held.copy_(values[name])
    pieces = [(part.replica, part.held) for part in parts.values() if part.replica is not None]
    _exchange([piece for piece in pieces if dist.get_world_size(piece[0].group) > 1])
    if torch.accelerator.is_available():
        # ZeRO-3 gathers on a stream of its own that does not wait for this one.
        torch.accelerator.synchronize()


def _exchange(pieces: list[tuple[_Replica, Tensor]]) -> None:
    """Give each rank the pieces of the others, bit for bit."""
    buckets: dict[Any, list[list[tuple[_Replica, Tensor]]]] = defaultdict(list)
    for replica, held in pieces:
        found = buckets[replica.group]
        if not found or sum(r.whole.nbytes for r, _ in found[-1]) + replica.whole.nbytes > _BUCKET:
            found.append([])
        found[-1].append((replica, held))
    for group, filled in buckets.items():
        for bucket in filled:
            # Added up as bytes of which all ranks but one have 0, so nothing is rounded.
            wholes = [replica.whole.view(torch.uint8) for replica, _ in bucket]
            flat = torch.zeros(sum(map(len, wholes)), dtype=torch.uint8, device=wholes[0].device)
            places = flat.split([len(whole) for whole in wholes])
            for place, (replica, held) in zip(places, bucket, strict=True):
                start = replica.start * held.element_size()
                place[start:][: held.nbytes] = held.view(torch.uint8)
            dist.all_reduce(flat, group=group)
            for place, whole in zip(places, wholes, strict=True):
                whole.copy_(place)


def _release_gathered(model: nn.Module) -> None:
    """Let go of whole copies of sharded parameters, so that shards are all there is."""
    for module in _fsdp_modules(model):
        module.reshard()
    engines = {id(p._z3_optimizer): p._z3_optimizer for p in _zero3(model.parameters())}
    for engine in engines.values():
        engine.empty_partition_cache()


def _reset_broken_forward(model: nn.Module) -> None:
    """Bring FSDP2 out of a forward that an exception broke off."""
    inner: set[int] = set()
    for module in _fsdp_modules(model):
        if id(module) not in inner and hasattr(module, "reset_iter_state"):
            module.reset_iter_state()
        inner.update(map(id, module.modules()))


def _fsdp_modules(model: nn.Module) -> list[Any]:
    """Modules that FSDP2 shards, outer ones first."""
    # Takes half a second to load; whoever has sharded a model has loaded it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def _zero3(parameters: Iterable[Any]) -> list[Any]:
    return [p for p in parameters if hasattr(p, "ds_tensor") and hasattr(p, "_z3_optimizer")]


def _refuse(model: nn.Module, parameters: Mapping[str, Any]) -> None:
    """Raise for engines whose shards can't be swapped here."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise NotImplementedError("FSDP1 is not supported: use FSDP2 (fsdp_version: 2)")
    for name, parameter in parameters.items():
        if not hasattr(parameter, "ds_id"):
            continue
        if not hasattr(parameter, "_z3_optimizer"):
            raise RuntimeError(
                f"{name!r} is partitioned by ZeRO-3, but no optimizer looks after it yet: make the "
                "shadow after accelerator.prepare or deepspeed.initialize with an optimizer"
            )
        if parameter.nvme_swapper is not None or parameter._z3_optimizer.swap_optimizer:
            raise NotImplementedError(
                f"{name!r} or its optimizer state is on NVMe, where q can't follow it: offload to "
                "the cpu, or use proposal='current' or 'cached'"
            )
        if parameter.ds_zero_param_process_group is not None:
            raise NotImplementedError(
                f"{name!r} has a second copy of its shard in the node (ZeRO++), which would stay "
                "theta's: set zero_hpz_partition_size to 1"
            )
