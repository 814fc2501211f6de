"""A copy of a loss belongs to the copies of its policy and optimizer, and keeps its q."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from iwsft import EMA, HardSync, ImportanceWeightedMLE

both_modes = pytest.mark.parametrize("functional", [True, False], ids=["functional", "module"])


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 3), nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight

    def log_prob(self, trajectories: TensorDictBase) -> Tensor:
        encoded = self.decoder(self.encoder(trajectories["observation"]).tanh())
        return -(encoded[..., :2] - trajectories["action"]).square().sum(-1)


def train(parts: tuple[nn.Module, Any, Any, Any], batch: TensorDictBase) -> Tensor:
    """Log-probs of the policy after three updates of the loss."""
    policy, loss, optimizer, q = parts
    for _ in range(3):
        optimizer.zero_grad()
        loss(batch)["loss_iw_mle"].backward()
        optimizer.step()
        q.step()
    with torch.no_grad():
        return policy.log_prob(batch.copy())


@both_modes
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0)])
@pytest.mark.parametrize("tied", [False, True])
def test_parts_that_are_copied_together_train_together(
    make_policy: Any, make_batch: Any, functional: bool, order: tuple[int, ...], tied: bool
) -> None:
    torch.manual_seed(0)
    policy, batch = _Tied() if tied else make_policy(), make_batch()
    loss = ImportanceWeightedMLE(policy, functional=functional)
    parts = policy, loss, torch.optim.Adam(loss.parameters(), lr=0.01), EMA(loss, decay=0.9)
    before = train(parts, batch)
    copied = deepcopy([parts[i] for i in order])
    own = tuple(part for _, part in sorted(zip(order, copied, strict=True), key=lambda x: x[0]))
    expected = train(parts, batch)
    assert not torch.equal(expected, before)
    torch.testing.assert_close(train(own, batch), expected, rtol=0, atol=0)


@both_modes
@pytest.mark.parametrize("copy", [deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize(
    "build", [lambda x: EMA(x, decay=0.9), lambda x: HardSync(x, every=2)], ids=["ema", "hard"]
)
def test_an_updater_that_replaces_the_q_of_a_copy_tells_so(
    make_policy: Any, functional: bool, copy: Callable[[Any], Any], build: Callable[[Any], Any]
) -> None:
    loss = ImportanceWeightedMLE(make_policy(), functional=functional)
    build(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Here q is theta still.
        build(copy(loss))
    with torch.no_grad():
        next(loss.parameters()).add_(1.0)
    with pytest.warns(UserWarning, match="the q that this loss came with is lost"):
        build(copy(loss))
