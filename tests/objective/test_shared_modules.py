"""A module that a policy holds under two names is one module of q, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from iwsft import EMA, ImportanceWeightedMLE


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.again = self.encoder

    def log_prob(self, trajectories: TensorDictBase) -> Tensor:
        encoded = self.again(self.encoder(trajectories["observation"]).tanh())
        return -(encoded[..., :2] - trajectories["action"]).square().sum(-1)


@pytest.mark.parametrize("functional", [True, False])
def test_a_shared_module_moves_once_an_update(make_batch: Any, functional: bool) -> None:
    batch = make_batch()
    torch.manual_seed(0)
    policy, plain = _Twice(), _Twice()
    plain.load_state_dict(policy.state_dict())
    loss = ImportanceWeightedMLE(policy, functional=functional)
    q = EMA(loss, decay=0.75)
    for _ in range(3):
        loss(batch)
        with torch.no_grad():
            policy.encoder.weight.add_(0.1)
            plain.encoder.weight.lerp_(policy.encoder.weight, 0.25)
        q.step()
    with loss.network(lagged=True) as of_q, torch.no_grad():
        torch.testing.assert_close(of_q.log_prob(batch), plain.log_prob(batch))
