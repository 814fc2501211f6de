"""Related methods in the trainer: what they read, refuse and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from iwsft import ImportanceWeights, weights
from iwsft.trajectory import DATA_WEIGHT, REF_LOG_PROB, SUCCESS_RATE
from tests.language.tiny import losses, trainer, trajectories

DFT: dict[str, Any] = {"proposal": "current", "importance_weights": ImportanceWeights.dft()}
PSFT: dict[str, Any] = {
    "proposal": "current",
    "reference": "synced",
    "sync_every": 3,
    "importance_weights": ImportanceWeights.psft(0.01),
}


def test_dft_needs_no_reference_and_is_not_sft(tmp_path: Path) -> None:
    dft, plain = (
        trainer(tmp_path / name, max_steps=2, **settings)
        for name, settings in (
            ("dft", DFT),
            (
                "plain",
                {
                    "reference": "none",
                    "importance_weights": ImportanceWeights([weights.Temperature(1.0)], None),
                },
            ),
        )
    )
    for run in (dft, plain):
        run.train()
        assert run.reference_key is None
        assert REF_LOG_PROB not in run._trajectories.keys(include_nested=True)
    assert losses(dft) == losses(plain)
    last = dft.state.log_history[0]
    assert "kl_approx" not in last and 0 < last["weight_max"] < 1


def test_psft_masks_what_left_its_limit_since_the_sync(tmp_path: Path) -> None:
    run = trainer(tmp_path, **PSFT)
    run.train()
    clipped = [row["clip_fraction"] for row in run.state.log_history if "clip_fraction" in row]
    # At a sync all ratios are 1; between two syncs some leave the limit.
    assert clipped[0] == clipped[3] == clipped[6] == 0 and min(clipped[1], clipped[4]) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"importance_weights": ImportanceWeights.psft()},
            "set reference='synced' and a sync_every, such as 50, in args",
        ),
        ({"reference": "synced"}, "reference='synced' needs sync_every"),
        ({"sync_every": 5}, "sync_every=5 changes nothing without .* reference='synced'"),
        (
            {"importance_weights": ImportanceWeights.nft()},
            "read 'success_rate', which the trajectories lack: iwsft.language.weigh_correct",
        ),
        ({"reference": "gone"}, "reference='gone' must be one of"),
        ({"reference": "none", "proposal": "reference"}, "reference='none' has no pi_ref"),
        (
            {"reference": "none", "importance_weights": ImportanceWeights.paper_llm()},
            "weigh by the probability of whole trajectories",
        ),
        (
            {**PSFT, "proposal": "cached"},
            "reference='synced' needs proposal='current', not 'cached'",
        ),
        ({"importance_weights": ImportanceWeights.topr()}, "and no row has one: pass"),
        (
            {"importance_weights": ImportanceWeights.asymre(), "proposal": "reference"},
            "and no row has one: pass",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings)


@pytest.mark.parametrize("name", ["topr", "nft", "asft"])
def test_layouts_and_parts_of_an_update_change_nothing(tmp_path: Path, name: str) -> None:
    """Signs, success rates and the reference reach each token of any micro-batch."""
    signed = trajectories()
    ids = signed["collector", "traj_ids"]
    sign = torch.where(ids % 3 == 0, -1.0, 1.0) * signed["masks", "all_assistant_mask"]
    signed.set(DATA_WEIGHT, sign).set(SUCCESS_RATE, 0.1 + 0.08 * ids)
    runs = [
        trainer(
            tmp_path / str(number),
            data=signed.copy(),
            importance_weights=getattr(ImportanceWeights, name)(),
            learning_rate=1e-3,
            **own,
        )
        for number, own in enumerate(
            (
                {},
                {"layout": "packed"},
                {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
            )
        )
    ]
    for run in runs:
        run.train()
    for other in runs[1:]:
        assert losses(other) == pytest.approx(losses(runs[0]), rel=1e-4, abs=1e-5)


def test_a_baseline_above_the_mean_reward_is_refused(tmp_path: Path) -> None:
    data = trajectories()
    signs = torch.where(data["collector", "traj_ids"] < 2, 1.0, -1.0)
    data.set(DATA_WEIGHT, signs * data["masks", "all_assistant_mask"])
    with pytest.raises(ValueError, match="mean of at most 0"):
        trainer(
            tmp_path,
            data=data,
            proposal="reference",
            importance_weights=ImportanceWeights.asymre(),
        )
