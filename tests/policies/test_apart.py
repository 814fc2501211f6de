"""A policy reads each trajectory alone: one that looks across their borders is refused."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.utils.rnn import pad_sequence

from iwsft import ImportanceWeightedMLE, annotate_reference
from iwsft.trajectory import TRAJ_IDS

LENGTHS = [5, 3, 4]


class Own(nn.Module):
    """Normal(mean, 0.3), with a mean that subclasses compute from all observations of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.GRU(3, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.head, self.one = nn.Linear(8, 2), nn.Linear(3, 1)

    def mean(self, seen: Tensor, batch: TensorDictBase) -> Tensor:
        return self.head(self.memory(seen)[0])

    def log_prob(self, batch: TensorDictBase) -> Tensor:
        mean = self.mean(batch["observation"], batch)
        return Normal(mean, 0.3).log_prob(batch["action"]).sum(-1)


class Attends(Own):
    def mean(self, seen: Tensor, batch: TensorDictBase) -> Tensor:
        return self.attention(seen, seen, seen)[0][..., :2]


class Broadcasts(Own):
    def log_prob(self, batch: TensorDictBase) -> Tensor:
        return Normal(self.one(batch["observation"]), 0.3).log_prob(batch["action"][:, 0]).sum(-1)


class ReadsTimeFirst(Own):
    def mean(self, seen: Tensor, batch: TensorDictBase) -> Tensor:
        self.memory.batch_first = False
        return self.head(self.memory(seen)[0])


class Resets(Own):
    """It is apart, and in train mode it draws noise and follows the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.noise, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(8)

    def mean(self, seen: Tensor, batch: TensorDictBase) -> Tensor:
        sizes = batch[TRAJ_IDS].unique_consecutive(return_counts=True)[1].tolist()
        rows = pad_sequence(seen.split(sizes), batch_first=True)
        out = self.memory(rows)[0]
        flat = torch.cat([row[:size] for row, size in zip(out, sizes, strict=True)])
        return self.head(self.noise(self.norm(flat)))


class Draws(Own):
    """Its noise is there in eval mode, too, and so is the count of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def mean(self, seen: Tensor, batch: TensorDictBase) -> Tensor:
        self.calls += 1
        return self.one(seen) + torch.randn(2)


class ReadsWholeBatches(Own):
    def mean(self, seen: Tensor, batch: TensorDictBase) -> Tensor:
        return self.one(seen.reshape(sum(LENGTHS), 3)).expand(-1, 2)


def packed(dtype: torch.dtype = torch.float32) -> TensorDict:
    torch.manual_seed(0)
    ids = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
    steps = {"observation": torch.randn(12, 3), "action": torch.rand(12, 2)}
    steps = {key: value.to(dtype) for key, value in steps.items()}
    return TensorDict({**steps, "collector": {"traj_ids": ids}}, [12])


@pytest.mark.parametrize("kind", [Own, Attends, Broadcasts, ReadsTimeFirst])
def test_one_that_looks_across_is_refused_at_once(kind: type[Own]) -> None:
    data, says = packed(), "packed trajectories lie back to back: reset"
    if kind is ReadsTimeFirst:
        data, says = data.exclude("collector").reshape(3, 4), "a row is a trajectory"
    loss = ImportanceWeightedMLE(kind(), proposal="reference")
    for read in (loss, lambda x: annotate_reference(kind(), x)):
        with pytest.raises(ValueError, match=f"alone, .* behind another; {says}"):
            read(data)
    # It looks at each batch until one has two trajectories.
    loss = ImportanceWeightedMLE(kind(), proposal="reference")
    loss(data[:5] if kind is not ReadsTimeFirst else data[:1])
    with pytest.raises(ValueError, match=says):
        loss(data)


@pytest.mark.parametrize("kind", [Resets, ReadsWholeBatches])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_that_reads_each_alone_is_not(kind: type[Own], dtype: torch.dtype) -> None:
    policy, data = kind().to(dtype), packed(dtype)
    annotate_reference(policy, data)
    loss = ImportanceWeightedMLE(policy, proposal="reference")
    assert bool(loss(data)["loss_iw_mle"].isfinite())
    assert policy.training


def test_one_with_the_same_rows_as_in_padded_batches_is_not() -> None:
    policy, rows = Own(), packed().exclude("collector").reshape(3, 4)
    expected = torch.stack([policy.log_prob(row) for row in rows])
    torch.testing.assert_close(annotate_reference(policy, rows)["ref_log_prob"], expected.detach())
    ImportanceWeightedMLE(policy, proposal="reference")(rows)


def test_noise_and_buffers_are_those_without_a_comparison() -> None:
    """The first call, which compares, gives the numbers of the second, which does not."""
    data, policy = packed(), Draws()
    loss = ImportanceWeightedMLE(policy, proposal="reference", functional=False)
    torch.manual_seed(1)
    compared = loss(data)["loss_iw_mle"]
    assert float(policy.calls) == 1
    torch.manual_seed(1)
    torch.testing.assert_close(loss(data)["loss_iw_mle"], compared, rtol=0, atol=0)
