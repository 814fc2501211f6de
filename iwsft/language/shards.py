"""q in shards: each process keeps its part of q, for a model of any size."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iwsft.checkpoint import CheckpointError


def compile_nothing() -> None:
    """Keep DeepSpeed on the CPU from compiling collectives, for minutes, that training never calls.

    It must be called before the process group is made.
    """
    # ``deepspeed.comm.torch`` by itself is torch, which the package imports by ``*``.
    backend: Any = import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


class Shards:
    """Holds q of a model, and gives :class:`~iwsft.EMA` the pairs (q, theta) of this process.

    q is kept in float32 (float64 for float64 parameters): in bfloat16 most of a moving average
    would never move. Each process keeps q of the trainable parameters that it holds, on their
    device, and no step gathers anything: all of a plain or replicated module, its partition of the
    float32 master (DeepSpeed ZeRO-1 to 3), or its local shard (FSDP2).

    The cost is 4 bytes a trainable parameter of this process, and within :meth:`swapped` a copy of
    its shard. Frozen parameters and buffers of q are theta's. ``model`` is what the engine
    returned. ``optimizer`` is accelerate's, which knows when it skipped an update.

    Parameters or optimizer states on NVMe, second copies of the shards (ZeRO++) and FSDP1 are
    refused.
    """

    def __init__(self, model: nn.Module, *, optimizer: Any = None) -> None:
        self.model = model
        self._optimizer = optimizer
        self._swapped = False
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        if not self._names:
            raise ValueError(f"{type(model).__name__} has no trainable parameter (requires_grad)")
        _refuse(model)
        self._q: dict[str, Tensor] = {}
        for name, part in self._parts().items():
            wide = torch.promote_types(part.theta.dtype, torch.float32)
            self._q[name] = part.theta.to(wide, copy=True)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Each part of q on this process and the part of theta that it follows."""
        parts = self._parts()
        if getattr(self._optimizer, "step_was_skipped", False):
            return []
        return [(self._q[name], part.theta) for name, part in parts.items()]

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within, the model's parameters are q, cast to their dtype; after, theta bit for bit.

        No gradient is recorded within, and nothing within may change parameters. Whole copies of
        parameters that an engine holds are released. Under ZeRO-1 and 2 all processes must enter
        together.
        """
        parts = self._parts()
        theta = {name: part.computed.clone() for name, part in parts.items()}
        self._swapped = True
        try:
            _write(parts, self._q)
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
                self._swapped = False

    def state_dict(self) -> dict[str, Tensor]:
        """This process's part of q (not copied)."""
        return dict(self._q)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state_dict` of the same process of the same engine; others are refused."""
        saved = {(name, tuple(getattr(q, "shape", ()))) for name, q in state_dict.items()}
        differing = saved ^ {(name, tuple(q.shape)) for name, q in self._q.items()}
        if differing:
            name = min(differing)[0]
            raise CheckpointError(
                f"{name!r} differs between the saved q and this model's: resume with the model, "
                "engine, stage and number of processes of the first run"
            )
        for name, q in self._q.items():
            q.copy_(state_dict[name])

    def _parts(self) -> dict[str, _Part]:
        """This process's parts of the trainable parameters, without gathered copies."""
        if self._swapped:
            raise RuntimeError("within swapped() the parameters are those of q: leave it first")
        _release_gathered(self.model)
        parameters = dict(self.model.named_parameters())
        return {name: _Part.of(parameters[name]) for name in self._names}


class _Part(NamedTuple):
    """This process's part of a parameter."""

    # The engine computes with this, in the parameter's dtype.
    computed: Tensor
    # The float32 master if the engine has one, else ``computed``.
    theta: Tensor
    # The flat parameter that a group of processes holds whole, and where the part begins in it
    # (ZeRO-1 and 2).
    whole: Tensor | None = None
    start: int = 0
    group: Any = None

    @classmethod
    def of(cls, parameter: Any) -> _Part:
        if hasattr(parameter, "ds_tensor"):
            engine, computed = parameter._z3_optimizer, parameter.ds_tensor.data
            place = engine.grad_position.get(engine.get_param_id(parameter))
            if place is None:
                return cls(computed, computed)
            # The result of safe_get_local_fp32_param, without its copy off the host.
            group, offset, number = place
            return cls(computed, engine.fp32_partitioned_groups_flat[group].data[offset:][:number])
        if hasattr(parameter, "_hp_mapping"):
            whole, group = parameter.data.view(-1), parameter._dp_group
            fragment = parameter._hp_mapping
            if fragment is None:
                return cls(whole[:0], whole[:0], whole, 0, group)
            start, number = fragment.lp_fragment_address.start, fragment.lp_fragment_address.numel
            return cls(whole[start:][:number], fragment.hp_fragment.data, whole, start, group)
        computed = parameter.data
        if hasattr(computed, "to_local"):
            # A DTensor: FSDP2.
            computed = computed.to_local()
        return cls(computed, computed)


@torch.no_grad()
def _write(parts: Mapping[str, _Part], values: Mapping[str, Tensor]) -> None:
    """Make these the model's parameters, on all processes."""
    for name, part in parts.items():
        part.computed.copy_(values[name])
        if part.whole is not None and dist.get_world_size(part.group) > 1:
            _exchange(part, part.whole.view(torch.uint8))
    if torch.accelerator.is_available():
        # ZeRO-3 gathers on a stream of its own that does not wait for this one.
        torch.accelerator.synchronize()


def _exchange(part: _Part, whole: Tensor) -> None:
    """Give each process the bytes of a parameter that the others have."""
    # Added up as bytes of which all processes but one have 0, so nothing is rounded.
    own, mine = torch.zeros_like(whole), part.computed.view(torch.uint8)
    own[part.start * part.computed.element_size() :][: len(mine)] = mine
    dist.all_reduce(own, group=part.group)
    whole.copy_(own)


def _release_gathered(model: nn.Module) -> None:
    """Release whole copies of sharded parameters, so that only shards are left."""
    for module in _fsdp_modules(model):
        module.reshard()
    parameters: Any = model.parameters()
    engines = {id(p._z3_optimizer): p._z3_optimizer for p in parameters if hasattr(p, "ds_tensor")}
    for engine in engines.values():
        engine.empty_partition_cache()


def _reset_broken_forward(model: nn.Module) -> None:
    """Bring FSDP2 out of a forward that an exception broke off, where torch can."""
    inner: set[int] = set()
    for module in _fsdp_modules(model):
        if id(module) not in inner and hasattr(module, "reset_iter_state"):
            module.reset_iter_state()
        inner.update(map(id, module.modules()))


def _fsdp_modules(model: nn.Module) -> list[Any]:
    """Modules that FSDP2 shards, outer ones first."""
    # The package takes half a second to load; where a model is sharded it is loaded already.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def _refuse(model: nn.Module) -> None:
    """Raise for engines whose shards can't be swapped here."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise NotImplementedError("FSDP1 is not supported: use FSDP2 (fsdp_version: 2)")
    parameters: Any = model.parameters()
    for parameter in parameters:
        if not parameter.requires_grad or not hasattr(parameter, "ds_id"):
            continue
        if parameter.nvme_swapper is not None or parameter._z3_optimizer.swap_optimizer:
            raise NotImplementedError("q can't follow parameters on NVMe: offload to the cpu")
        if parameter.ds_zero_param_process_group is not None:
            raise NotImplementedError("q can't follow ZeRO++: set zero_hpz_partition_size to 1")
