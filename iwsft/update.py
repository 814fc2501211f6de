"""One update of one or several seeds: losses, gradients and Adam, perhaps as a CUDA graph."""

from __future__ import annotations

import gc
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, is_dataclass
from inspect import signature
from types import FunctionType
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import TargetNetUpdater

from iwsft.fingerprint import text_of
from iwsft.objective import LOSS, ImportanceWeightedMLE
from iwsft.policies.log_prob import evaluating, noise_watch

# Random numbers that a loss reads from a batch: the result of its method ``draw_noise``.
NOISE = "noise"
# Plain updates before a capture, as torch's documentation of CUDA graphs asks for.
_WARM_UP = 2
Results = tuple[list[TensorDictBase], list[TensorDictBase]]


@dataclass(frozen=True)
class Learning:
    """What an update of one seed changes.

    Attributes:
        loss: Loss whose outputs ``loss...`` are minimised.
        optimizer: Optimizer with a group of parameters for each network.
        clip_norms: Largest norm of the gradient of each group.
        read: Function from what was drawn to a batch.
    """

    loss: LossModule
    optimizer: torch.optim.Optimizer
    clip_norms: Sequence[float]
    read: Callable[[TensorDictBase], TensorDictBase]

    def descend(self) -> None:
        """Move the parameters against their gradients."""
        for group, limit in zip(self.optimizer.param_groups, self.clip_norms, strict=True):
            if limit < math.inf:
                nn.utils.clip_grad_norm_(group["params"], limit)
        self.optimizer.step()


class Update:
    """Updates the parameters of all seeds at once: outputs of the losses, and the batches.

    Several seeds are one :class:`Stack`. With ``graph`` the update of each ``phase`` of a loss is
    captured as a CUDA graph.
    """

    def __init__(self, seeds: Sequence[Learning], *, graph: bool) -> None:
        self._seeds = seeds
        self._stack = Stack([seed.loss for seed in seeds]) if len(seeds) > 1 else None
        self._graphs: dict[Any, _Graph] | None = {} if graph else None

    def __call__(self, drawn: Sequence[TensorDictBase], *, measured: bool = True) -> Results:
        """Make an update; without ``measured`` the outputs may be the losses alone."""
        if self._graphs is None:
            loss = self._seeds[0].loss if self._stack is None else self._stack.template
            with nullcontext() if measured else loss_alone(loss):
                return self._compute(drawn)
        phase = getattr(self._seeds[0].loss, "phase", None)
        if phase not in self._graphs:
            device = next(self._seeds[0].loss.parameters()).device
            self._graphs[phase] = _Graph(self._compute, device)
        return self._graphs[phase](drawn)

    def _compute(self, drawn: Sequence[TensorDictBase]) -> Results:
        batches = [seed.read(one) for seed, one in zip(self._seeds, drawn, strict=True)]
        if self._stack is None:
            (seed,), (batch,) = self._seeds, batches
            seed.optimizer.zero_grad()
            out = seed.loss(batch)
            _total(out).backward()
            outputs = [out.detach()]
        else:
            outputs = self._stack.backward(batches)
        for seed in self._seeds:
            seed.descend()
        return outputs, batches

    def close(self) -> None:
        """Give each loss tensors of its own again."""
        if self._stack is not None:
            self._stack.close()


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Within, results below the smallest normal number (1e-38 in float32) are 0, on x86.

    Adam's moments of a unit that is never active decay to such numbers within some 700 updates.
    They are exact to a few digits only, and arithmetic with them takes many times as long.
    """
    # Whatever the default dtype is.
    small = torch.tensor(1e-20, dtype=torch.float32, device="cpu")
    kept = bool(small * small)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(not kept)


@contextmanager
def loss_alone(loss: LossModule) -> Iterator[None]:
    """Within, our loss computes no diagnostics, which take a twentieth of a small update."""
    if not isinstance(loss, ImportanceWeightedMLE):
        yield
        return
    kept = loss.out_keys
    loss.out_keys = [LOSS]
    try:
        yield
    finally:
        loss.out_keys = kept


@contextmanager
def interrupts_unmasked() -> Iterator[None]:
    """Raise KeyboardInterrupt where tensordict made another error of it while swapping parameters.

    It does so wherever a loss, a target or q is computed with parameters of its own.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise


def check_follows(loss: LossModule, sampler: Any, updater: TargetNetUpdater | None) -> None:
    """Check that the updater moves the targets of this loss, or the weights of this sampler."""
    if updater is None and getattr(loss, "has_lagged_q", False):
        raise ValueError(
            "proposal='lagged' without an updater: q would stay where it is, and so would all "
            "weights; pass updater=HardSync(loss, every=...) or updater=EMA(loss, decay=...), or "
            "take proposal='reference', which is SFT. To train with a q of your own that stays, "
            "make HardSync(loss, every=N) with N above the number of updates, then load q"
        )
    if getattr(updater, "loss_module", loss) is not loss:
        raise ValueError("the updater moves the targets of another loss: make one of this loss")
    if updater is None and getattr(loss, "proposal", None) == "cached":
        _tell_of_equal_weights(loss, sampler)
    written, drawn = (getattr(each, "trajectories", None) for each in (updater, sampler))
    if written is not None and drawn is not None:
        key = updater.key  # type: ignore[union-attr]
        both = [each.get(key, default=None) for each in (written, drawn)]
        # A slice has the memory of the whole, from its first entry on.
        if len({None if x is None else (x.data_ptr(), x.shape) for x in both}) > 1:
            raise ValueError(
                f"a sync would write {key!r} into other trajectories than the sampler draws from: "
                "curate first, then pass both the same"
            )


def _tell_of_equal_weights(loss: Any, sampler: Any) -> None:
    """Warn of cached weights that are those of the start and that nothing moves."""
    trajectories = getattr(sampler, "trajectories", {})
    weight = trajectories.get(loss.tensor_keys.importance_weight, None)
    if weight is not None and bool((weight == 1).all()):
        way_out = "pass updater=HardSync(loss, every=..., trajectories=...), or call reweight again"
        problem = "proposal='cached' without an updater: all weights are 1, and stay so, as in SFT"
        warnings.warn(f"{problem}; {way_out}", UserWarning, stacklevel=5)


def check_draws(loss: LossModule, sampler: Any) -> None:
    """Check that there are loss and sampler, and that whole trajectories come where needed."""
    if not isinstance(loss, LossModule):
        way_out = "pass ImportanceWeightedMLE(policy), or another LossModule of TorchRL"
        raise TypeError(f"a {type(loss).__name__} is not a loss; {way_out}")
    if not callable(getattr(sampler, "sample", None)):
        way_out = "pass StepSampler(trajectories, 256) or TrajectorySampler(trajectories, 8)"
        raise TypeError(f"a {type(sampler).__name__} is not a sampler of batches; {way_out}")
    if not getattr(sampler, "cuts_trajectories", False):
        return
    draws = f"{type(sampler).__name__} draws single steps"
    if getattr(loss, "needs_whole_trajectories", False):
        raise ValueError(
            f"this loss weighs whole trajectories, and {draws}: take TrajectorySampler, "
            "proposal='cached', or weights with reduce=None"
        )
    if not getattr(loss, "length_normalize", True):
        raise ValueError(
            f"length_normalize=False adds up whole trajectories, and {draws}, each trajectory "
            "alike: take TrajectorySampler"
        )
    if isinstance(loss, ImportanceWeightedMLE) and not _reads_single_steps(loss, sampler):
        raise ValueError(
            f"log p of a step depends on the other steps of its batch, as that of a policy with a "
            f"memory does, and {draws}: take TrajectorySampler"
        )


@torch.no_grad()
def _reads_single_steps(loss: ImportanceWeightedMLE, sampler: Any) -> bool:
    """Whether log p of a step is the same in another order of the batch; True if noise hides it."""
    if "is_init" in getattr(loss.actor_network, "in_keys", ()):
        # TorchRL's mark of where a memory starts.
        return False
    steps = torch.arange(sampler.batch_size) % len(sampler.trajectories)
    with evaluating(loss.actor_network):
        noisy = noise_watch(loss.actor_network, sampler.device)
        orders = [loss.log_prob(sampler.take(x.to(sampler.device))) for x in (steps, steps.flip(0))]
    # Half the digits, for the rounding of a row may depend on its place.
    dtypes = {x.dtype for x in (*loss.parameters(), orders[0]) if x.is_floating_point()}
    tolerance = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    ahead, back = orders[0], orders[1].flip(0)
    return noisy() or torch.allclose(ahead, back, rtol=tolerance, atol=tolerance, equal_nan=True)


def check_static(loss: LossModule, sampler: Any, *, graph: bool, stacked: bool) -> None:
    """Check that updates of a loss can be captured (``graph``) or ``stacked`` with others.

    A stack does not draw dropout, whose numbers would not be those of a seed alone.
    """
    if graph:
        elsewhere = {next(loss.parameters()).device, getattr(sampler, "device", None)}
        for device in elsewhere - {None}:
            if device.type != "cuda":
                raise ValueError(f"graph=True needs networks and data on a GPU, not on {device}")
    if not hasattr(sampler, "draw"):
        raise ValueError(
            f"batches of {type(sampler).__name__} differ in shape, so there is no CUDA graph and "
            "no stack of seeds: draw single steps"
        )
    if not stacked:
        return
    if not getattr(loss, "functional", True):
        raise ValueError("only a loss with functional=True can be stacked")
    # A functional loss keeps its networks out of its children.
    networks = [part for part in vars(loss).values() if isinstance(part, nn.Module)]
    for module in [inner for network in networks for inner in network.modules()]:
        if isinstance(module, nn.Dropout) and module.p:
            raise ValueError("networks with dropout can't be stacked; train one seed at a time")


def check_alike(losses: Sequence[LossModule], **others: Sequence[Any]) -> None:
    """Check that losses were made alike, and that all values of each other list are equal.

    A stack computes all losses with the settings, and the networks, of the first one.
    """
    forms = [form_of(loss, "") for loss in losses]
    names = dict.fromkeys(name for form in forms for name in form)
    others |= {name: [form.get(name) for form in forms] for name in names}
    for name, values in others.items():
        if odd := [value for value in values if value != values[0]]:
            raise ValueError(
                f"a stack needs one {name.rpartition('.')[2]} for all seeds, here are {values[0]} "
                f"and {odd[0]}; train them one after another"
            )


def form_of(thing: Any, place: str) -> dict[str, str]:
    """The arguments that made a loss, its networks or an updater, as texts that stay the same."""
    form = {f"{place}class": type(thing).__name__}
    arguments = signature(type(thing).__init__).parameters
    for name, value in [*vars(thing).items(), *getattr(thing, "_modules", {}).items()]:
        if isinstance(value, nn.Module):
            form |= form_of(value, f"{place}{name}.") if isinstance(thing, nn.Module) else {}
        elif name.lstrip("_") in arguments and (is_dataclass(value) or _is_plain(value)):
            form[place + name] = text_of(value)
    if isinstance(thing, LossModule):
        frozen = [name for name, each in thing.named_parameters() if not each.requires_grad]
        form[f"{place}frozen"] = repr(frozen)
    return form


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, bool | int | float | str | type | FunctionType | torch.dtype | None)


class Stack:
    """Losses that differ in their tensors alone, computed as one whose networks are stacked.

    The tensors of each loss become views of stacked ones ``[S, ...]``, which ``torch.vmap`` maps
    the loss over. So everything else works on each loss as if it were alone: its optimizer, target
    networks, probes. Numbers are those of each seed alone, to rounding.
    """

    def __init__(self, losses: Sequence[LossModule]) -> None:
        self._losses = losses
        # Holds the slices of the mapped call, so that no loss has to.
        self.template = pickle.loads(pickle.dumps(losses[0]))
        own = [_tensors(loss) for loss in losses]
        self._params = TensorDict(
            {name: torch.stack([one[name].data for one in own]) for name in own[0]}, [len(losses)]
        )
        trained = {id(each) for each in losses[0].parameters() if each.requires_grad}
        self._trained: list[tuple[Tensor, list[Tensor]]] = []
        self._members: list[Tensor] = []
        for key, stacked in self._params.items(True, True):
            name, *rest = key if isinstance(key, tuple) else (key,)
            members = [one[name].get(tuple(rest)) if rest else one[name] for one in own]
            self._members += members
            for member, view in zip(members, stacked.unbind(), strict=True):
                member.data = view
            if id(members[0]) in trained:
                self._trained.append((stacked.requires_grad_(), members))
        self._forget()

    def backward(self, batches: Sequence[TensorDictBase]) -> list[TensorDictBase]:
        """Compute the losses of a batch for each, and the gradients of their parameters."""
        for stacked, _ in self._trained:
            stacked.grad = None
        phase = getattr(self._losses[0], "phase", None)
        if phase is not None:
            self.template.phase = phase
        out = torch.vmap(self._call)(self._params, torch.stack(list(batches)))
        _total(out, seeds=len(batches)).sum().backward()
        for stacked, members in self._trained:
            gradients = [None] * len(members) if stacked.grad is None else stacked.grad.unbind()
            for member, gradient in zip(members, gradients, strict=True):
                member.grad = gradient
        return [out[i].detach() for i in range(len(batches))]

    def _call(self, params: TensorDictBase, batch: TensorDictBase) -> TensorDictBase:
        loss = self.template
        for name, value in params.items():
            (loss._modules if name in loss._modules else loss._parameters)[name] = value
        # Parts of the networks that TorchRL keeps between calls.
        loss._cache = {}
        return loss(batch)

    def close(self) -> None:
        """Give each loss tensors of its own again."""
        for member in self._members:
            member.data = member.data.clone()
        self._forget()

    def _forget(self) -> None:
        """Empty caches of tensors that no longer are the networks'."""
        for loss in self._losses:
            if hasattr(loss, "_cache"):
                loss._cache = {}


def _tensors(loss: LossModule) -> dict[str, Any]:
    """Parameters and targets of a loss, by the names of its attributes."""
    networks = {name: part for name, part in loss.named_children() if name.endswith("_params")}
    single = {name: part for name, part in loss._parameters.items() if part is not None}
    return {**networks, **single}


class _Graph:
    """Calls of a function with static shapes, captured after two plain ones.

    A replay waits for nothing, unlike one of tensordict's ``CudaGraphModule``.
    """

    def __init__(
        self, function: Callable[[Sequence[TensorDictBase]], Results], device: torch.device
    ) -> None:
        self._function = function
        self._device = device
        self._inputs: list[TensorDictBase] = []
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._results: Results = [], []

    def __call__(self, drawn: Sequence[TensorDictBase]) -> Results:
        """Compute the results, which the next call overwrites."""
        if not self._inputs:
            self._inputs = [one.to(self._device).clone() for one in drawn]
        for static, one in zip(self._inputs, drawn, strict=True):
            static.update_(one, non_blocking=True)
        self._calls += 1
        if self._calls <= _WARM_UP:
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                results = self._function(self._inputs)
            current.wait_stream(stream)
            return results
        if self._graph is None:
            # An earlier graph that is freed during a capture makes the capture fail.
            gc.collect()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._results = self._function(self._inputs)
        self._graph.replay()
        return self._results


def _total(out: TensorDictBase, *, seeds: int = 1) -> Tensor:
    """Sum of the losses among the outputs, a number for each seed."""
    losses = []
    for name, value in out.items():
        if name.startswith("loss"):
            losses.append(value)
            if value.numel() != seeds:
                shape = f"{name!r} has shape {list(value.shape)}"
                way_out = "a loss to minimise is one number, as with reduction='mean' or 'sum'"
                raise ValueError(f"{shape}; {way_out}")
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)
