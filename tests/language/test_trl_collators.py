"""A collator of the user's own in TRL's trainer: it may pad the rows, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from tests.language.trl_cases import decoder, in_trl, trained

Batch = dict[str, torch.Tensor]


class Pads:
    """Pads rows on the right, or on the left."""

    def __init__(self, *, left: bool = False) -> None:
        self.left = left

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        longest = max(len(row["input_ids"]) for row in rows)

        def pad(row: list[int], value: int) -> torch.Tensor:
            spare = [value] * (longest - len(row))
            return torch.tensor([*spare, *row] if self.left else [*row, *spare])

        ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": torch.stack([pad(row, 0) for row in ids]),
            "attention_mask": torch.stack([pad([1] * len(row), 0) for row in ids]),
            "labels": torch.stack([pad(row["labels"], -100) for row in rows]),
        }


class Sorts(Pads):
    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return super().__call__(sorted(rows, key=lambda row: len(row["input_ids"])))


class TrainsPrompts(Pads):
    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        batch = super().__call__(rows)
        return batch | {"labels": batch["input_ids"].where(batch["attention_mask"] > 0, -100)}


class ChangesPrompts(Pads):
    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        batch = super().__call__(rows)
        return batch | {"input_ids": batch["input_ids"].where(batch["labels"] != -100, 5)}


class DropsARow(Pads):
    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        return super().__call__(rows[:-1])


def losses(folder: Path, **own: Any) -> list[float]:
    return [row["loss"] for row in trained(in_trl(folder, decoder(), **own))]


@pytest.mark.parametrize(
    "collator", [Pads(left=True), Sorts(), TrainsPrompts(), ChangesPrompts(), DropsARow()]
)
def test_a_collator_that_moves_or_changes_tokens_is_refused(tmp_path: Path, collator: Any) -> None:
    """Each token would be divided by log pi_ref of another one, or by none."""
    name = type(collator).__name__
    with pytest.raises(ValueError, match=f"{name} moves or changes tokens, or trains others"):
        losses(tmp_path, data_collator=collator, proposal="current")


def test_a_collator_that_pads_gives_the_numbers_of_trls(tmp_path: Path) -> None:
    own = {"proposal": "current", "learning_rate": 1e-3}
    expected = losses(tmp_path / "trl", **own)
    assert losses(tmp_path / "own", data_collator=Pads(), **own) == pytest.approx(expected)
    assert len(set(expected)) == len(expected)
