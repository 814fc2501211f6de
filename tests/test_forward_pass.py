"""ForwardPass against one call on everything, and against the closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase, lazy_stack
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import ProbabilisticActor

from iwsft import forward_pass as module
from iwsft.forward_pass import ForwardPass
from iwsft.policies import GaussianPolicy
from iwsft.trajectory import MASK, TRAJ_IDS, Segments, pack, pad


def packed(sizes: list[int], seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    steps = sum(sizes)
    ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return TensorDict(
        {
            "observation": torch.randn(steps, 4, generator=generator),
            "action": torch.rand(steps, 2, generator=generator) * 2 - 1,
            "collector": {"traj_ids": ids},
        },
        [steps],
    )


@pytest.fixture
def policy() -> GaussianPolicy:
    torch.manual_seed(0)
    return GaussianPolicy(4, 2, hidden=(32, 32))


class Recorder:
    """A policy that says how long each trajectory of its batch is, and keeps what it saw."""

    def __init__(self) -> None:
        self.seen: list[TensorDictBase] = []

    def log_prob(self, trajectories: TensorDictBase) -> Tensor:
        self.seen.append(trajectories.clone())
        segments = Segments.of(trajectories)
        return segments.spread(segments.lengths)


@pytest.mark.parametrize("rows", [1, 16, 40, 100, 10**9])
def test_chunks_give_the_same_bits_as_one_call(policy: GaussianPolicy, rows: int) -> None:
    data = packed([3, 70, 1, 40, 2, 2])
    whole = policy.log_prob(data.copy()).detach()
    got = ForwardPass(policy, data, rows=rows).log_prob()
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert torch.equal(got, whole)


def test_is_the_density_of_a_normal(policy: GaussianPolicy) -> None:
    data = packed([5, 20])
    with torch.no_grad():
        filled = policy(data.clone())
    loc, scale = filled["loc"].double(), filled["scale"].double()
    z = (data["action"].double() - loc) / scale
    expected = (-0.5 * z**2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(ForwardPass(policy, data).log_prob().double(), expected)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 200))
def test_chunks_are_whole_trajectories_none_tiny(sizes: list[int], rows: int) -> None:
    data = packed(sizes)
    recorder = Recorder()
    ForwardPass(recorder, data, rows=rows).log_prob()
    assert torch.equal(torch.cat([chunk[TRAJ_IDS] for chunk in recorder.seen]), data[TRAJ_IDS])
    assert sum(len(chunk[TRAJ_IDS].unique()) for chunk in recorder.seen) == len(sizes)
    lengths = [len(chunk) for chunk in recorder.seen]
    assert min(lengths) >= min(16, sum(sizes))
    # At most a trajectory and a remainder beyond what was asked for.
    assert max(lengths) <= max(rows, 16 + max(sizes)) + 15


def test_chunks_are_cut_where_the_next_trajectory_does_not_fit() -> None:
    recorder = Recorder()
    ForwardPass(recorder, packed([16, 16, 4, 12, 15, 16]), rows=16).log_prob()
    # 15 steps are too few for a chunk.
    assert [len(chunk) for chunk in recorder.seen] == [16, 16, 16, 31]
    recorder = Recorder()
    ForwardPass(recorder, packed([20, 12, 30]), rows=32).log_prob()
    assert [len(chunk) for chunk in recorder.seen] == [32, 30]


def test_a_policy_with_memory_sees_whole_trajectories() -> None:
    data = packed([30, 50, 20, 60])
    recorder = Recorder()
    got = ForwardPass(recorder, data, rows=45).log_prob()
    assert len(recorder.seen) > 1
    assert got.tolist() == [30.0] * 30 + [50.0] * 50 + [20.0] * 20 + [60.0] * 60


def test_padded_is_packed_and_zero_off_the_mask(policy: GaussianPolicy) -> None:
    data = packed([3, 17, 9, 30])
    padded = pad(data)
    off = ~padded.get(MASK)
    padded["observation"][off] = torch.nan
    got = ForwardPass(policy, padded, rows=40).log_prob()
    assert got.shape == padded.batch_size
    assert bool((got[off] == 0).all())
    padded.set("log_prob", got)
    torch.testing.assert_close(pack(padded)["log_prob"], ForwardPass(policy, data).log_prob())


def test_time_inside_a_one_dimensional_batch(policy: GaussianPolicy) -> None:
    padded = pad(packed([3, 17, 9]))
    flat = TensorDict(dict(padded.items()), [3])
    flat[MASK] = padded.get(MASK)
    assert torch.equal(
        ForwardPass(policy, flat, rows=20).log_prob(),
        ForwardPass(policy, padded, rows=20).log_prob(),
    )


def test_a_row_of_several_trajectories_is_not_cut(policy: GaussianPolicy) -> None:
    data = packed([7, 13, 18, 2, 5, 15])
    padded = data.reshape(3, 20)
    recorder = Recorder()
    got = ForwardPass(recorder, padded, rows=20).log_prob()
    assert [len(batch) for batch in recorder.seen] == [1, 1, 1]
    assert got.reshape(-1).tolist() == [float(n) for n in [7, 13, 18, 2, 5, 15] for _ in range(n)]
    whole = ForwardPass(policy, data).log_prob()
    torch.testing.assert_close(ForwardPass(policy, padded, rows=20).log_prob().view(-1), whole)


def test_batches_go_to_the_device_of_the_policy_or_the_given_one() -> None:
    class Elsewhere(Recorder):
        model = nn.Linear(1, 1)

        def log_prob(self, trajectories: TensorDictBase) -> Tensor:
            self.seen.append(trajectories)
            return torch.ones(trajectories.batch_size)

    model = nn.Linear(1, 1)
    model.device = torch.device("meta")
    for of_model, chosen, expected in (
        (nn.Linear(1, 1), None, None),
        (model, None, "meta"),
        (nn.Linear(1, 1), "meta", "meta"),
        (model, "cpu", "cpu"),
    ):
        policy = Elsewhere()
        policy.model = of_model
        got = ForwardPass(policy, packed([3, 4]), device=chosen).log_prob()
        assert got.tolist() == [1.0] * 7
        (seen,) = policy.seen
        assert (None if seen.device is None else seen.device.type) == expected


def test_processes_take_turns(policy: GaussianPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them and five batches: the last is run again, and nothing in it is new."""
    data, batches = packed([3, 5, 2, 9, 4, 6, 1]), [[0], [1, 2], [3, 1], [4], [5, 6]]
    whole = ForwardPass(policy, data, batches)
    held: list[list[Tensor]] = []
    passes = []
    for rank in range(2):
        monkeypatch.setattr(module, "rank_and_world", lambda rank=rank: (rank, 2))
        # One that is not shared runs everything.
        alone = ForwardPass(policy, data, batches)
        assert alone.rounds == 5 and torch.equal(alone.log_prob(), whole.log_prob())
        passes.append(ForwardPass(policy, data, batches, shared=True))
    for start, stop in ((0, 3), (1, 2), (1, 3)):
        monkeypatch.setattr(module, "gathered", lambda mine: [held.append(mine) or mine] * 2)
        passes[1].run(start, stop)
        monkeypatch.setattr(module, "gathered", lambda mine: [mine, held[-1]])
        assert passes[0].rounds == 3 and len(held[-1]) == stop - start
        got = passes[0].placed(passes[0].run(start, stop), start)
        expected = whole.placed(whole.run(2 * start, min(2 * stop, 5)), 2 * start)
        assert torch.equal(got, expected) and bool((got != 0).any())


@pytest.mark.parametrize("batches", [None, [[1, 0], [2]]])
def test_masked_steps_are_zero_and_may_hold_nan(policy: GaussianPolicy, batches: Any) -> None:
    data = packed([3, 7, 4])
    mask = torch.arange(14) % 4 > 0
    expected = torch.where(mask, policy.log_prob(data.copy()).detach(), 0.0)
    data["observation"][~mask] = torch.nan
    data.set(MASK, mask)
    torch.testing.assert_close(ForwardPass(policy, data, batches).log_prob(), expected)


def test_segments_of_another_mask(policy: GaussianPolicy) -> None:
    data = packed([10, 10])
    mask = torch.arange(20) % 3 > 0
    got = ForwardPass(policy, data, segments=Segments.of(data, mask=mask)).log_prob()
    assert torch.equal(got != 0, mask)


def test_data_and_modes_stay_as_they_were(policy: GaussianPolicy) -> None:
    data = packed([30, 30])
    keys = set(data.keys(True, True))
    policy.train()
    policy.module[0].eval()
    modes = [module.training for module in policy.modules()]
    ForwardPass(policy, data, rows=20).log_prob()
    assert set(data.keys(True, True)) == keys
    assert [module.training for module in policy.modules()] == modes
    assert len(set(modes)) == 2


def test_a_lazy_stack_is_not_written_into(policy: GaussianPolicy) -> None:
    rows = [packed([20], seed=i).exclude("collector") for i in range(3)]
    stack = lazy_stack(rows)
    got = ForwardPass(policy, stack, rows=20).log_prob()
    assert torch.equal(got, policy.log_prob(torch.stack(rows)).detach())
    assert set(rows[0].keys()) == {"observation", "action"}


def test_dropout_is_off_and_comes_back_after_an_error() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)
            self.broken = False

        def log_prob(self, trajectories: TensorDictBase) -> Tensor:
            if self.broken:
                raise RuntimeError("broken")
            return self.dropout(torch.ones(trajectories.batch_size))

    module, data = Dropped(), packed([100])
    assert bool((ForwardPass(module, data).log_prob() == 1).all())
    module.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        ForwardPass(module, data).log_prob()
    assert module.training and module.dropout.training


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_is_float32_or_wider(dtype: torch.dtype, expected: torch.dtype) -> None:
    class Constant:
        def log_prob(self, trajectories: TensorDictBase) -> Tensor:
            return torch.full(trajectories.batch_size, 0.5, dtype=dtype)

    out = ForwardPass(Constant(), packed([4, 4])).log_prob()
    assert out.dtype == expected
    assert out.tolist() == [0.5] * 8


def test_a_trailing_one_is_dropped() -> None:
    class Column:
        def log_prob(self, trajectories: TensorDictBase) -> Tensor:
            return trajectories["observation"][:, :1]

    data = packed([4, 40])
    assert torch.equal(ForwardPass(Column(), data, rows=20).log_prob(), data["observation"][:, 0])


def test_distribution_that_is_not_independent_is_named() -> None:
    net = TensorDictModule(
        nn.Sequential(nn.Linear(4, 4), _Split()), in_keys=["observation"], out_keys=["loc", "scale"]
    )
    actor = ProbabilisticActor(
        net, in_keys=["loc", "scale"], distribution_class=torch.distributions.Normal
    )
    with pytest.raises(ValueError, match=r"\[20, 2\], not \[20\].*Independent"):
        ForwardPass(actor, packed([20])).log_prob()


class _Split(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = x.chunk(2, -1)
        return loc, scale.exp()


@pytest.mark.parametrize(
    ("policy", "error", "match"),
    [
        (object(), TypeError, "object has no log_prob"),
        (type("P", (), {"log_prob": lambda self, td: td})(), TypeError, "P.log_prob gives"),
    ],
)
def test_no_policy(policy: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ForwardPass(policy, packed([4])).log_prob()


def test_bad_input(policy: GaussianPolicy) -> None:
    with pytest.raises(ValueError, match="rows=0"):
        ForwardPass(policy, packed([4]), rows=0).log_prob()
    empty = packed([4])[:0]
    with pytest.raises(ValueError, match="not a single step"):
        ForwardPass(policy, empty).log_prob()
    with pytest.raises(KeyError, match="traj_ids"):
        ForwardPass(policy, packed([4]).exclude(TRAJ_IDS)).log_prob()
