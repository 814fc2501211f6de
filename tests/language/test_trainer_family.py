"""Related methods in the trainer: what they read, refuse and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iwsft import ImportanceWeights, weights
from iwsft.trajectory import REF_LOG_PROB
from tests.language.tiny import losses, trainer

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
        ({"importance_weights": ImportanceWeights.psft()}, "set reference='synced' and sync_every"),
        ({"reference": "synced"}, "sync_every=None .* reference='synced'"),
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
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings)
