"""Reference log-probs of tokens: once, on all processes, resumable, kept on disk."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from tensordict import TensorDictBase
from torch import Tensor

from iwsft.language.batches import Layout, collate
from iwsft.language.ranks import from_first, gathered, rank_and_world
from iwsft.language.reference_key import data_digest, reference_key
from iwsft.language.reference_pass import Pass
from iwsft.policies.causal_lm import CausalLMPolicy
from iwsft.policies.causal_lm_families import peft_model
from iwsft.policies.log_prob import evaluating
from iwsft.reference import check_unlocked, near, read_log_prob, write_log_prob
from iwsft.trajectory import REF_LOG_PROB, TOKENS

_log = logging.getLogger(__name__)
# Speed is measured on one part to size the next; a part that was fast by chance must not matter.
_GROWTH = 8


@dataclass(frozen=True)
class Annotation:
    """What :func:`annotate_tokens` did.

    Attributes:
        key: of the kept file, for :func:`cached_reference`; None without a cache.
        batches: of the whole pass, on all processes.
        computed: how many of them ran now; the rest were read.
    """

    key: str | None
    batches: int
    computed: int


def annotate_tokens(
    policy: CausalLMPolicy,
    trajectories: TensorDictBase,
    batches: Sequence[Sequence[int]] = (),
    *,
    cache: str | Path | None = None,
    layout: Layout = "padded",
    pad_token_id: int = 0,
    multiple_of: int = 8,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    device: torch.device | str | None = None,
    group: Any = None,
    save_every: float = 60.0,
) -> Annotation:
    """Write log pi_ref of every token into packed trajectories, as ``ref_log_prob``.

    With the micro-batches that training begins with, the log-probs of its first update are the same
    bits as these (a model without dropout, in float32 or less), so its first weights are exactly 1.
    A trajectory in several batches has its log-probs from the first; one in none gets a batch at
    the end. Batches that hold nothing new are left out.

    The model runs in eval mode without gradient; with PEFT adapters it runs without them
    (``policy.reference()``). Processes take turns batch by batch, all run equally often, and all
    end up with all log-probs; only the first one reads and writes files.

    With ``cache`` the result is kept in that folder under a key of everything it depends on, see
    :func:`~iwsft.language.reference_key.reference_key`. The first batch of each process is always
    run, for its log-probs are part of the key: what is read is what would be computed. Progress is
    kept too, so a pass that was killed goes on where it stood.

    Args:
        policy: pi_ref; its model may be sharded by DeepSpeed or FSDP2.
        trajectories: packed, see ``iwsft.datasets.text.tokens``; the same on all processes;
            changed in place.
        batches: entries of a :class:`~iwsft.language.batches.TrajectoryDataset`, batch by batch:
            the micro-batches of the first epoch, those of all processes in turns
            (:meth:`iwsft.language.plan.UpdatePlan.epoch`).
        cache: folder of kept results, made where it is missing; None keeps nothing.
        layout: of a batch; this and the next two as in training, see
            :func:`~iwsft.language.batches.collate`.
        pad_token_id: token in the padding.
        multiple_of: of the padded length.
        context: makes what each forward runs in, such as autocast, as in training.
        device: where batches go; by default the device of the model.
        group: process group; all processes by default.
        save_every: seconds between savings of progress.

    Raises:
        KeyError: trajectories without tokens or masks.
        ValueError: an entry that is not there, trajectories that are locked, not packed or not the
            same on all processes, log-probs that are not finite (it names the trajectory), or a
            kept file that is corrupt.
        OSError: the cache can't be written; nothing half-written stays.

    Warns:
        UserWarning: adapters that change the log-probs already, so that first weights are not 1.
    """
    check_unlocked(trajectories)
    rank, world = rank_and_world(group)
    work = Pass.of(trajectories, batches, rank=rank, world=world)
    how = _Batching(layout, pad_token_id, multiple_of, torch.device(device or _device(policy)))
    folder = None if cache is None else Path(cache)
    if folder is not None:
        # Before the first forward, so that a folder that can't be made costs nothing.
        from_first(lambda: folder.mkdir(parents=True, exist_ok=True), group)
    data = data_digest(trajectories)
    _check_same(data, group)
    run = _Runner(policy, work, how, context)
    with torch.no_grad(), evaluating(policy):
        with _reference_of(policy):
            head = run(0)
            if folder is None:
                kept = None
            else:
                with context():
                    plan = (work.batches, world, layout, pad_token_id, multiple_of)
                    key = reference_key(policy, data, plan, head, group=group)
                kept = _Kept(folder, key, work)
            log_prob, computed = _swept(run, head, kept, save_every, group)
        _check_adapters(policy, run, head, group)
    trajectories.set(REF_LOG_PROB, log_prob.to(trajectories.get(TOKENS).device))
    return Annotation(None if kept is None else kept.key, len(work.batches), computed)


def cached_reference(
    trajectories: TensorDictBase, key: str, *, cache: str | Path, group: Any = None
) -> None:
    """Write a kept reference into packed trajectories: for a resumed run, whose model has moved.

    Args:
        trajectories: packed, those that were annotated; changed in place.
        key: :attr:`Annotation.key` of the run.
        cache: folder of kept results; the first process reads it.
        group: process group; all processes by default.

    Raises:
        FileNotFoundError: the kept file is gone.
        ValueError: it is corrupt, or belongs to other trajectories.
    """
    check_unlocked(trajectories)
    if data_digest(trajectories) != key.split("-")[0]:
        raise ValueError(
            f"the reference {key} of this run belongs to other trajectories; resume with the data, "
            "tokenizer, template and max_length of the first run"
        )
    path = _path(Path(cache), key)
    way_out = (
        "this run's model has moved, so it can't be computed again from it: put a copy of the file "
        "back, or start afresh with another output folder"
    )

    def read() -> Tensor:
        if not path.exists():
            raise FileNotFoundError(f"the reference of this run, {path}, is gone; {way_out}")
        return read_log_prob(path, label=key, way_out=way_out)

    log_prob = from_first(read, group)
    trajectories.set(REF_LOG_PROB, log_prob.to(trajectories.get(TOKENS).device))


@dataclass(frozen=True)
class _Batching:
    layout: Layout
    pad_token_id: int
    multiple_of: int
    device: torch.device

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise ValueError(f"layout={self.layout!r} is unknown; it is one of {get_args(Layout)}")


@dataclass(frozen=True)
class _Runner:
    """Runs this process's batch of a round: float32 log-probs of its new tokens, on the CPU."""

    policy: CausalLMPolicy
    work: Pass
    how: _Batching
    context: Callable[[], AbstractContextManager[Any]]

    def __call__(self, number: int) -> Tensor:
        batch, new = self.work.mine(number)
        how = self.how
        collated = collate(
            [self.work.dataset[trajectory] for trajectory in batch],
            layout=how.layout,
            pad_token_id=how.pad_token_id,
            multiple_of=how.multiple_of,
        ).to(how.device)
        with self.context():
            found = self.policy.log_prob(collated).float().cpu()
        sizes = self.work.sizes[batch].tolist()
        rows = found.split(sizes) if how.layout == "packed" else found
        parts = {t: row[:size] for t, row, size in zip(batch, rows, sizes, strict=True)}
        return torch.cat([torch.empty(0), *(parts[trajectory] for trajectory in new)])


@dataclass(frozen=True)
class _Kept:
    """Files of a pass: the parts that are done, and the whole."""

    folder: Path
    key: str
    work: Pass

    def read(self) -> tuple[Tensor | None, list[Tensor], int]:
        """The whole; or the parts that are there from the start on, and their rounds.

        Raises:
            ValueError: a corrupt file.
        """
        path = _path(self.folder, self.key)
        if path.exists():
            return read_log_prob(path, label=self.key), [], 0
        parts: list[Tensor] = []
        done = 0
        while found := sorted(self.folder.glob(self._part(done, "*")), key=_stop):
            stop = _stop(found[-1])
            parts.append(read_log_prob(found[-1], label=found[-1].name))
            done = stop
        return None, parts, done

    def write_part(self, start: int, stop: int, log_prob: Tensor) -> None:
        path = self.folder / self._part(start, stop)
        write_log_prob(path, log_prob, label=path.name)
        _log.info("reference: %d of %d rounds of batches", stop, self.work.rounds)

    def write(self, log_prob: Tensor) -> None:
        write_log_prob(_path(self.folder, self.key), log_prob, label=self.key)
        for part in self.folder.glob(self._part("*", "*")):
            part.unlink(missing_ok=True)

    def _part(self, start: int | str, stop: int | str) -> str:
        return f"ref_log_prob-{self.key}.rounds-{start}-{stop}.npy"


def _stop(part: Path) -> int:
    return int(part.stem.rsplit("-", 1)[1])


def _path(folder: Path, key: str) -> Path:
    return folder / f"ref_log_prob-{key}.npy"


def _swept(
    run: _Runner, head: Tensor, kept: _Kept | None, save_every: float, group: Any
) -> tuple[Tensor, int]:
    """Log-probs in the layout of the trajectories, and how many batches were run for them."""
    work = run.work
    first = min(work.world, len(work.batches))
    parts: list[Tensor] = []
    done, ahead = 0, work.rounds
    if kept is not None:
        whole, parts, done = from_first(kept.read, group)
        if whole is not None:
            return whole, first
        ahead = 1
    computed = first if done > 0 else 0
    while done < work.rounds:
        stop = min(done + ahead, work.rounds)
        began = time.monotonic()
        # The first round has been run for the key.
        mine = [head if number == 0 else run(number) for number in range(done, stop)]
        rounds = zip(*gathered(mine, group), strict=True)
        part = torch.cat([log_prob for beside in rounds for log_prob in beside])
        _check_finite(part, work, done, stop)
        if kept is not None:
            ahead = _saved(kept, done, stop, part, began, save_every, group)
        parts.append(part)
        computed += min(stop * work.world, len(work.batches)) - done * work.world
        done = stop
    log_prob = torch.empty(len(work.ids))
    log_prob[work.tokens(0, work.rounds)] = torch.cat(parts)
    if kept is not None:
        from_first(lambda: kept.write(log_prob), group)
    return log_prob, computed


def _saved(
    kept: _Kept,
    start: int,
    stop: int,
    part: Tensor,
    began: float,
    save_every: float,
    group: Any,
) -> int:
    """Keep a part; the number of rounds of the next one, the same on all processes."""

    def save() -> int:
        if stop < kept.work.rounds:
            kept.write_part(start, stop, part)
        speed = (stop - start) / max(time.monotonic() - began, 1e-6)
        return max(1, min(int(speed * save_every), _GROWTH * (stop - start)))

    return from_first(save, group)


def _check_finite(log_prob: Tensor, work: Pass, start: int, stop: int) -> None:
    bad = (~log_prob.isfinite()).nonzero().squeeze(1)
    if len(bad) == 0:
        return
    place = work.tokens(start, stop)[bad]
    traj_id = int(work.ids[place[0]])
    token = int(place[0]) - int((work.ids == traj_id).nonzero()[0])
    others = len(work.ids[place].unique()) - 1
    more = f", and is not finite in {others} more of these batches" if others else ""
    raise ValueError(
        f"the reference gives log-prob {float(log_prob[bad[0]])} at token {token} of trajectory "
        f"{traj_id}{more}: look at that row of the data (trajectory n is row n, from 0) and at the "
        "weights of the model; in float16, use bfloat16 or float32"
    )


def _check_same(data: str, group: Any) -> None:
    everyone = gathered(data, group)
    if len(set(everyone)) > 1:
        odd = next(rank for rank, other in enumerate(everyone) if other != everyone[0])
        raise ValueError(
            f"process {odd} holds other trajectories than process 0; read and tokenise the same "
            "data on all of them, in the same order"
        )


def _check_adapters(policy: CausalLMPolicy, run: _Runner, head: Tensor, group: Any) -> None:
    """Warn of adapters that do something already."""
    if not _has_adapters(policy):
        return
    moved = not torch.allclose(run(0), head, rtol=near(policy), atol=near(policy))
    if any(gathered(moved, group)):
        warnings.warn(
            "the adapters change the log-probs already; the reference is the model without them, "
            "so the first weights are not 1. To take the model as it is for the reference, "
            "merge them into it (merge_and_unload()) and add new ones",
            UserWarning,
            stacklevel=3,
        )


@contextmanager
def _reference_of(policy: CausalLMPolicy) -> Iterator[None]:
    """Within, the model without adapters, where it has some."""
    with policy.reference() if _has_adapters(policy) else nullcontext():
        yield


def _has_adapters(policy: CausalLMPolicy) -> bool:
    try:
        peft_model(policy.model)
    except TypeError:
        return False
    return True


def _device(policy: CausalLMPolicy) -> torch.device:
    # An engine knows better than parameters that are offloaded.
    found = getattr(policy.model, "device", None)
    return found if found is not None else next(policy.parameters()).device
