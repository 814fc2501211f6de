"""Token trajectories -> batches: how one is collated, and which trajectories an epoch's hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain, repeat
from typing import Any, Literal, get_args

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from iwsft.datasets.text.tokens import CORRECT, SCORE
from iwsft.fingerprint import fingerprint
from iwsft.samplers import check_same_settings, multiplicities
from iwsft.trajectory import (
    ASSISTANT_MASK,
    ATTENTION_MASK,
    DATA_WEIGHT,
    GIVEN_REF_LOG_PROB,
    MASK,
    MULTIPLICITY,
    SUCCESS_RATE,
    TOKENS,
    TRAJ_IDS,
    lengths,
    pad,
    select,
)
from iwsft.validation import check_packed, check_tensordict

Layout = Literal["padded", "packed"]
# Position of a token among all packed trajectories, for a trainer that writes into its batches.
PLACE: NestedKey = ("collector", "place")


class TrajectoryDataset(Dataset[TensorDictBase]):
    """Whole trajectories of a packed dataset; each is as many entries as its multiplicity says.

    An epoch of any sampler (torch's, transformers' or :class:`EpochBatches`) therefore holds the
    trajectories in proportion to their multiplicity. The dataset refers to ``trajectories``, and
    copies nothing, so entries show values that are written into them later, such as those of
    ``reweight``. Their assistant mask is turned off at first tokens, which nothing predicts.

    Raises:
        TypeError: These are no trajectories, such as what ``tokenize`` returns as a whole.
        KeyError: Tokens or masks are missing.
        ValueError: A multiplicity is negative, changes within a trajectory, or is 0 everywhere.
    """

    def __init__(self, trajectories: TensorDictBase) -> None:
        check_tensordict(trajectories)
        present = set(trajectories.keys(True, True))
        for key in (TOKENS, ATTENTION_MASK, ASSISTANT_MASK, TRAJ_IDS):
            if key not in present:
                raise KeyError(f"{key!r} is missing: pass what iwsft.language.tokenize makes")
        check_packed(trajectories)
        self.trajectories = trajectories
        sizes = lengths(trajectories).cpu()
        multiplicity = multiplicities(trajectories, sizes)
        self._trajectory = torch.arange(len(sizes)).repeat_interleave(multiplicity)
        self._stops = sizes.cumsum(0)
        self._sizes = sizes
        mask = trajectories.get(ASSISTANT_MASK)
        first = (self._stops - sizes).to(mask.device)
        if bool(mask[first].any()):
            trajectories.set(ASSISTANT_MASK, mask.index_fill(0, first, False))

    def __len__(self) -> int:
        return len(self._trajectory)

    @property
    def sizes(self) -> Tensor:
        """Tokens of each entry, int64 ``[len(self)]``."""
        return self._sizes[self._trajectory]

    def positions(self, entries: Sequence[int]) -> list[int]:
        """Positions in the data, counted from 0, of the trajectories of some entries."""
        return [*self._trajectory[list(entries)].tolist()]

    def drawn(self, entries: Sequence[int]) -> TensorDictBase:
        """The distinct trajectories of some entries, which count once for each of them."""
        positions, draws = self._trajectory[list(entries)].unique(return_counts=True)
        multiplicity = draws.repeat_interleave(self._sizes[positions])
        return select(self.trajectories, positions).set(MULTIPLICITY, multiplicity)

    @property
    def undrawn(self) -> Tensor:
        """Positions in the data of the trajectories with multiplicity 0, int64."""
        drawn = self._trajectory.bincount(minlength=len(self._sizes))
        return (drawn == 0).nonzero().flatten()

    @property
    def judges(self) -> TensorDictBase:
        """The trajectories with multiplicity 0, each of which counts once here."""
        judges = select(self.trajectories, self.undrawn)
        return judges.set(MULTIPLICITY, torch.ones(len(judges), dtype=torch.int64))

    def __getitem__(self, entry: int) -> TensorDictBase:
        """One trajectory, batch size ``[T]``, as a view without multiplicity."""
        (trajectory,) = self.positions([entry])
        stop = int(self._stops[trajectory])
        steps = self.trajectories[stop - int(self._sizes[trajectory]) : stop]
        # A trajectory counts once for each of its entries.
        return steps.exclude(MULTIPLICITY, SCORE, CORRECT)

    def __getitems__(self, entries: Sequence[int]) -> list[TensorDictBase]:
        """The examples of a batch; without entries one of multiplicity 0, for the model to run."""
        if entries:
            return [self[entry] for entry in entries]
        filler = self[0]
        return [filler.set(MULTIPLICITY, torch.zeros(len(filler), dtype=torch.int64))]


def collate(
    examples: Sequence[TensorDictBase],
    *,
    layout: Layout = "padded",
    pad_token_id: int | None = 0,
    multiple_of: int = 8,
) -> TensorDict:
    """One batch of trajectories, in the order of their ids.

    A trajectory that occurs several times is in the batch once, with its number of occurrences as
    its multiplicity: the same loss and gradient for less work.

    :class:`~iwsft.language.ImportanceWeightedTrainer` reads such batches. transformers' ``Trainer``
    makes a dict of them and fails, unless a subclass has ``_prepare_inputs`` return
    ``inputs.to(self.args.device)``.

    Args:
        examples: Packed trajectories, one each, with their ids in the dataset. One with a
            multiplicity counts that often.
        layout: ``"padded"`` for ``[B, T]``, padded on the right where the masks are False, or
            ``"packed"`` for ``[N]``, trajectories back to back without padding.
        pad_token_id: Token in the padding, 0 for None; readers tell padding by the masks.
        multiple_of: Number that T is a multiple of, the least that fits the longest trajectory.

    Returns:
        The keys of the examples and ``multiplicity``, int64, one number per token.

    Raises:
        ValueError: Examples do not fit together, or a setting is out of range.
    """
    if layout not in get_args(Layout) or multiple_of < 1:
        raise ValueError(f"{layout=} must be one of {get_args(Layout)}, {multiple_of=} at least 1")
    merged = _merged(examples)
    packed = torch.cat([merged[traj_id] for traj_id in sorted(merged)])
    if layout == "packed":
        return packed
    longest = max(len(example) for example in merged.values())
    length = -(-longest // multiple_of) * multiple_of
    padded = pad(packed, length).exclude(MASK)
    attention = padded.get(ATTENTION_MASK)
    padded.set(TOKENS, padded.get(TOKENS).masked_fill(~attention, pad_token_id or 0))
    return padded


def _merged(examples: Sequence[TensorDictBase]) -> dict[int, TensorDictBase]:
    """Each distinct trajectory once, by id, with its multiplicity."""
    keys = set(examples[0].keys(True, True)) - {MULTIPLICITY}
    merged: dict[int, TensorDictBase] = {}
    for example in examples:
        odd = keys ^ (set(example.keys(True, True)) - {MULTIPLICITY})
        if odd:
            raise ValueError(f"only some examples have {', '.join(sorted(map(str, odd)))}")
        ids = example.get(TRAJ_IDS)
        traj_id = int(ids[0])
        if bool((ids != traj_id).any()):
            raise ValueError(f"an example must be one trajectory, not {ids.unique().tolist()}")
        multiplicity = example.get(MULTIPLICITY, default=None)
        multiplicity = torch.ones_like(ids) if multiplicity is None else multiplicity
        twin = merged.get(traj_id)
        if twin is None:
            merged[traj_id] = example.copy().set(MULTIPLICITY, multiplicity)
            continue
        if not torch.equal(twin.get(TOKENS), example.get(TOKENS)):
            raise ValueError(f"two different examples have the id {traj_id} ({TRAJ_IDS!r})")
        twin.set(MULTIPLICITY, twin.get(MULTIPLICITY) + multiplicity)
    return merged


class EpochBatches(Sampler[list[int]]):
    """A DataLoader's ``batch_sampler`` whose epochs hold every entry once.

    The order of an epoch depends only on the seed and the number of the epoch. An iterator ends
    with its epoch; the next one continues where it stopped. The state counts the batches that were
    handed out, those that workers have fetched ahead included.

    Args:
        sizes: Tokens of each entry, int64 ``[n]``.
        batch_size: Entries of a batch; set this or ``token_budget``.
        token_budget: Largest number of tokens of a batch, padding included if ``padded``. A batch
            takes entries in the order of the epoch while they fit.
        padded: Whether the entries of a batch are padded to the longest.
        multiple_of: Number that the padded length is a multiple of.
        seed: Seed of the order.

    Raises:
        ValueError: Settings are out of range, or an entry is larger than the budget.
    """

    def __init__(
        self,
        sizes: Tensor,
        *,
        batch_size: int | None = None,
        token_budget: int | None = None,
        padded: bool = False,
        multiple_of: int = 1,
        seed: int = 0,
    ) -> None:
        if (batch_size is None) == (token_budget is None):
            raise ValueError("set batch_size or token_budget, one of them")
        if (batch_size or token_budget or 0) < 1:
            raise ValueError(f"{batch_size=} or {token_budget=} must be at least 1")
        if len(sizes) == 0:
            raise ValueError("there is not a single entry to draw from")
        self._sizes = -(-sizes // multiple_of) * multiple_of if padded else sizes
        if token_budget is not None and int(self._sizes.max()) > token_budget:
            entry = int(self._sizes.argmax())
            problem = f"entry {entry} has {int(sizes[entry])} tokens, more than {token_budget=}"
            raise ValueError(f"{problem}; raise it, or tokenise with a smaller max_length")
        self.batch_size = batch_size
        self.token_budget = token_budget
        self.padded = padded
        self.seed = seed
        self.epoch = 0
        self._handed_out = 0

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch from its first batch, unless it is under way."""
        if epoch != self.epoch:
            self.epoch, self._handed_out = epoch, 0

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.of(self.epoch)
        last = len(batches) - 1
        for number in range(self._handed_out, len(batches)):
            # Before it is handed out, so that the state is always that of the next batch.
            self._handed_out = 0 if number == last else number + 1
            self.epoch += number == last
            yield batches[number]

    def __len__(self) -> int:
        """Number of batches of the current epoch."""
        if self.batch_size is not None:
            return -(-len(self._sizes) // self.batch_size)
        return len(self.of(self.epoch))

    def state_dict(self) -> dict[str, Any]:
        """Position in the epoch; batches that load it continue from here."""
        return {"epoch": self.epoch, "handed_out": self._handed_out, **self.settings()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict` of the same data and settings."""
        check_same_settings(state_dict, self.settings())
        self.epoch, self._handed_out = state_dict["epoch"], state_dict["handed_out"]

    def settings(self) -> dict[str, Any]:
        """Everything that determines the batches, as plain values."""
        return {
            "entries": len(self._sizes),
            "tokens": int(self._sizes.sum()),
            "batch_size": self.batch_size,
            "token_budget": self.token_budget,
            "padded": self.padded,
            "seed": self.seed,
        }

    def of(self, epoch: int) -> list[list[int]]:
        """All batches of an epoch."""
        seeds = torch.Generator().manual_seed(self.seed)
        # Each epoch has a seed of its own, so any epoch can be started alone.
        seed = int(torch.randint(2**62, (epoch + 1,), generator=seeds)[-1])
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self._sizes), generator=generator).tolist()
        if self.batch_size is not None:
            return [
                order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)
            ]
        assert self.token_budget is not None
        sizes = self._sizes.tolist()
        batches: list[list[int]] = [[]]
        for entry in order:
            tokens = [sizes[i] for i in (*batches[-1], entry)]
            total = max(tokens) * len(tokens) if self.padded else sum(tokens)
            if total > self.token_budget:
                batches.append([])
            batches[-1].append(entry)
        return batches


class EpochSampler:
    """Endless iterator over collated batches: epochs without replacement, as SFT users expect.

    An epoch holds each trajectory as often as its multiplicity says. Arguments are those of
    :class:`TrajectoryDataset`, :class:`EpochBatches` and :func:`collate`.
    """

    def __init__(
        self,
        trajectories: TensorDictBase,
        batch_size: int | None = None,
        *,
        token_budget: int | None = None,
        layout: Layout = "padded",
        pad_token_id: int | None = 0,
        multiple_of: int = 8,
        seed: int = 0,
    ) -> None:
        self.dataset = TrajectoryDataset(trajectories)
        self.batches = EpochBatches(
            self.dataset.sizes,
            batch_size=batch_size,
            token_budget=token_budget,
            padded=layout == "padded",
            multiple_of=multiple_of,
            seed=seed,
        )
        self._collate = partial(
            collate, layout=layout, pad_token_id=pad_token_id, multiple_of=multiple_of
        )
        # The batches iterate from a position of their own, which a loaded state sets.
        self._entries = chain.from_iterable(repeat(self.batches))

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self.batches.epoch

    def sample(self) -> TensorDict:
        """The next batch."""
        return self._collate([self.dataset[entry] for entry in next(self._entries)])

    def __iter__(self) -> Iterator[TensorDict]:
        return self

    def __next__(self) -> TensorDict:
        return self.sample()

    def state_dict(self) -> dict[str, Any]:
        """Position in the epoch; a sampler that loads it continues with the same batches."""
        return {**self.batches.state_dict(), "data": self._data}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; other trajectories and settings are refused."""
        check_same_settings(state_dict, {"data": self._data})
        self.batches.load_state_dict(state_dict)
        self._entries = chain.from_iterable(repeat(self.batches))

    @cached_property
    def _data(self) -> str:
        return token_fingerprint(self.dataset.trajectories)[:12]


def token_fingerprint(trajectories: TensorDictBase) -> str:
    """Fingerprint of tokens, the trained ones, weights, and where trajectories begin."""
    weights = (MULTIPLICITY, DATA_WEIGHT, SUCCESS_RATE, GIVEN_REF_LOG_PROB)
    keys = (TOKENS, ASSISTANT_MASK, TRAJ_IDS, *weights)
    entries = {str(key): trajectories.get(key, default=None) for key in keys}
    return fingerprint({key: entry for key, entry in entries.items() if entry is not None})
