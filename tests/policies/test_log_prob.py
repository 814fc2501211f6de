"""Noise is seen wherever it comes from; padding becomes finite, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from iwsft.policies.log_prob import finite_padding, noise_watch
from iwsft.trajectory import Segments

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


def test_noise_is_seen_in_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    # Another library captures a graph on a GPU meanwhile.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for policy in (nn.Linear(2, 2), nn.Dropout(0.5)):
        drawn = noise_watch(policy, CPU)
        assert not drawn()
        torch.rand(1)
        assert drawn()


def test_noise_on_a_gpu_is_seen_in_its_own_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {GPU: torch.zeros(3), torch.device("cuda", 0): torch.zeros(3)}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device].clone())
    drawn = noise_watch(nn.Linear(2, 2), GPU)
    torch.rand(1)
    states[torch.device("cuda", 0)] += 1
    assert not drawn()
    states[GPU] += 1
    assert drawn()


@pytest.mark.parametrize("way", ["compiled", "captured"])
@pytest.mark.parametrize(
    ("p", "training", "drops"), [(0.5, True, True), (0.5, False, False), (0.0, True, False)]
)
def test_while_a_graph_is_made_dropout_layers_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, way: str, p: float, training: bool, drops: bool
) -> None:
    owner, name, device = {
        "compiled": (torch.compiler, "is_compiling", CPU),
        "captured": (torch.cuda, "is_current_stream_capturing", GPU),
    }[way]
    monkeypatch.setattr(owner, name, lambda: True)
    policy = nn.Sequential(nn.Linear(2, 2), nn.Dropout(p)).train(training)
    assert bool(noise_watch(policy, device)()) == drops


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_only_what_a_gradient_would_meet_on_masked_steps_is_replaced(
    shape: tuple[int, ...],
) -> None:
    nan, inf = torch.nan, torch.inf
    mask = torch.tensor([True, False, False, True, False, True]).reshape(shape)
    flat = torch.tensor([nan, nan, 5.0, 1.0, -inf, inf])
    batch = TensorDict(
        {
            "flat": flat.reshape(shape),
            "nested": {"wide": torch.stack([flat, 2 + torch.arange(6.0)], -1).reshape(*shape, 2)},
            "whole": torch.arange(6).reshape(shape),
            "other": flat.reshape(shape),
            "collector": {
                "mask": mask,
                "traj_ids": torch.tensor([0, 0, 0, 1, 1, 1]).reshape(shape),
            },
        },
        shape,
    )
    before = batch.clone()
    keys = ["flat", ("nested", "wide"), "whole", "missing"]
    out = finite_padding(batch, Segments.of(batch), keys)
    expected = torch.tensor([nan, 0.0, 5.0, 1.0, 0.0, inf])
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(out["flat"].reshape(-1), expected, **same)
    wide = torch.stack([expected, 2 + torch.arange(6.0)], -1)
    torch.testing.assert_close(out["nested", "wide"].reshape(6, 2), wide, **same)
    for key in ("whole", "other"):
        torch.testing.assert_close(out[key], before[key], **same)
    for key in ("flat", ("nested", "wide")):
        torch.testing.assert_close(batch[key], before[key], **same)
