"""Tokenised trajectories -> batches for training: padded or packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.utils.data import Dataset

from iwsft.datasets.text.tokens import CORRECT, SCORE
from iwsft.samplers import multiplicities
from iwsft.trajectory import (
    ASSISTANT_MASK,
    ATTENTION_MASK,
    MASK,
    MULTIPLICITY,
    TOKENS,
    TRAJ_IDS,
    lengths,
    pad,
)

Layout = Literal["padded", "packed"]


class TrajectoryDataset(Dataset[TensorDictBase]):
    """Whole trajectories of a packed dataset by number, each as often as its multiplicity says.

    So an epoch of any sampler (torch's, transformers' or :class:`~iwsft.language.batches.
    EpochBatches`) holds the trajectories in proportion to their multiplicity. What is written into
    the trajectories later (``reweight``) is handed out.

    Args:
        trajectories: packed, see ``iwsft.datasets.text.tokens``. Held by reference, never copied.

    Raises:
        KeyError: no tokens or masks.
        ValueError: a multiplicity that is negative, changes within a trajectory, or is 0
            everywhere.
    """

    def __init__(self, trajectories: TensorDictBase) -> None:
        present = set(trajectories.keys(True, True))
        for key in (TOKENS, ATTENTION_MASK, ASSISTANT_MASK, TRAJ_IDS):
            if key not in present:
                raise KeyError(
                    f"{key!r} is missing; a language dataset is what "
                    f"iwsft.language.tokenize makes. There are {sorted(map(str, present))}"
                )
        self.trajectories = trajectories
        sizes = lengths(trajectories).cpu()
        multiplicity = multiplicities(trajectories, sizes)
        self._trajectory = torch.arange(len(sizes)).repeat_interleave(multiplicity)
        self._stops = sizes.cumsum(0)
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self._trajectory)

    @property
    def sizes(self) -> Tensor:
        """Tokens of each entry, int64 ``[len(self)]``."""
        return self._sizes[self._trajectory]

    def trajectory(self, number: int) -> int:
        """The trajectory of entry ``number``, counted from 0."""
        return int(self._trajectory[number])

    def __getitem__(self, number: int) -> TensorDictBase:
        """Entry ``number``: one trajectory, batch size ``[T]``, a view without multiplicity."""
        trajectory = self.trajectory(number)
        stop = int(self._stops[trajectory])
        steps = self.trajectories[stop - int(self._sizes[trajectory]) : stop]
        # Drawn as often as its multiplicity says, it counts once a draw.
        return steps.exclude(MULTIPLICITY, SCORE, CORRECT)


def collate(
    examples: Sequence[TensorDictBase],
    *,
    layout: Layout = "padded",
    pad_token_id: int = 0,
    multiple_of: int = 8,
) -> TensorDict:
    """One batch of trajectories, in the order of their ids.

    A trajectory that is drawn several times stands in the batch once, with the sum of the draws as
    its multiplicity: the same loss and gradient for less work. All other entries
    (``ref_log_prob``, ``importance_weight``, ...) are carried through. Fits a DataLoader's
    ``collate_fn`` and a transformers Trainer's ``data_collator``.

    Args:
        examples: packed, one trajectory each, with its id in the dataset; one with a multiplicity
            counts that often.
        layout: ``"padded"``: ``[B, T]``, padded on the right with masks off; ``"packed"``: ``[N]``,
            back to back, nothing padded.
        pad_token_id: token in the padding; the masks, not its value, tell what is padding.
        multiple_of: T is the least multiple of this that the longest trajectory fits in.

    Returns:
        The entries of the examples and ``multiplicity``, int64 a token.

    Raises:
        ValueError: no example, examples with other entries than the first, two different ones with
            the same id, one that holds several trajectories, or an unknown layout.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout={layout!r} is unknown; it is one of {get_args(Layout)}")
    if multiple_of < 1:
        raise ValueError(f"multiple_of={multiple_of} must be at least 1")
    merged = _merged(examples)
    packed = torch.cat([merged[traj_id] for traj_id in sorted(merged)])
    if layout == "packed":
        return packed
    longest = max(len(example) for example in merged.values())
    length = -(-longest // multiple_of) * multiple_of
    padded = pad(packed, length).exclude(MASK)
    attention = padded.get(ATTENTION_MASK)
    padded.set(TOKENS, padded.get(TOKENS).masked_fill(~attention, pad_token_id))
    return padded


def _merged(examples: Sequence[TensorDictBase]) -> dict[int, TensorDictBase]:
    """Each distinct trajectory once, by id, with its multiplicity."""
    if not examples:
        raise ValueError("there is no example to collate")
    keys = set(examples[0].exclude(MULTIPLICITY).keys(True, True))
    merged: dict[int, TensorDictBase] = {}
    for example in examples:
        entries = set(example.keys(True, True)) - {MULTIPLICITY}
        if entries != keys:
            odd = ", ".join(sorted(map(str, entries ^ keys)))
            raise ValueError(f"examples must have the same entries; only some have {odd}")
        ids = example.get(TRAJ_IDS)
        traj_id = int(ids[0])
        if bool((ids != traj_id).any()):
            raise ValueError(
                f"an example is one trajectory, this one holds the ids {ids.unique().tolist()}; "
                "hand over the trajectories one by one"
            )
        count = example.get(MULTIPLICITY, default=None)
        count = torch.ones_like(ids) if count is None else count
        twin = merged.get(traj_id)
        if twin is None:
            merged[traj_id] = example.copy().set(MULTIPLICITY, count)
            continue
        if not torch.equal(twin.get(TOKENS), example.get(TOKENS)):
            raise ValueError(
                f"two different examples have the id {traj_id}; number the trajectories "
                f"({TRAJ_IDS!r}), as iwsft.language.tokenize does"
            )
        twin.set(MULTIPLICITY, twin.get(MULTIPLICITY) + count)
    return merged
