"""Samplers against the batch that the paper writes down, by enumeration and by statistics."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from iwsft.curation import curate
from iwsft.objective import ImportanceWeightedMLE
from iwsft.policies import GaussianPolicy
from iwsft.samplers import StepSampler, TrajectorySampler, TransitionSampler
from iwsft.trajectory import DONE, MASK, TRAJ_IDS, from_steps, lengths, pad

SIZES = [3, 1, 6, 2, 4, 1]
MULTIPLICITY = [3, 1, 0, 2, 1, 5]


def dataset(sizes: list[int] = SIZES, multiplicity: list[int] | None = MULTIPLICITY) -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    size = torch.tensor(sizes)
    steps = int(size.sum())
    weight = torch.linspace(0.2, 3, len(sizes), dtype=torch.float64)
    data = TensorDict(
        {
            "observation": torch.randn(steps, 4, generator=generator, dtype=torch.float64),
            "action": torch.randn(steps, 2, generator=generator, dtype=torch.float64),
            "ref_log_prob": torch.randn(steps, generator=generator),
            "importance_weight": weight.repeat_interleave(size),
            "step": torch.arange(steps),
            "next": {"observation": torch.zeros(steps, 4), "reward": torch.zeros(steps, 1)},
            "collector": {"traj_ids": (2 * torch.arange(len(sizes)) + 5).repeat_interleave(size)},
        },
        [steps],
    )
    if multiplicity is not None:
        data["multiplicity"] = torch.tensor(multiplicity).repeat_interleave(size)
    return data


def parameters() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4, 2, generator=generator, dtype=torch.float64).requires_grad_()


def log_prob(theta: Tensor, batch: TensorDictBase) -> Tensor:
    """log of a unit Normal around a linear mean, up to a constant, per step."""
    return -0.5 * (batch["action"] - batch["observation"] @ theta).square().sum(-1)


def trajectories_of(batch: TensorDictBase) -> list[TensorDictBase]:
    ids = batch.get(TRAJ_IDS)
    return [batch[ids == i] for i in ids.unique().tolist()]


def literal(theta: Tensor, drawn: list[TensorDictBase]) -> Tensor:
    """Mean over a list of trajectories, repeats included, of -w (sum log p) / length."""
    terms = [-t["importance_weight"][0] * log_prob(theta, t).sum() / len(t) for t in drawn]
    return torch.stack(terms).mean()


def weighted(theta: Tensor, batch: TensorDictBase) -> Tensor:
    """- sum_j m_j w_j (sum_i log p_ji) / length_j / sum_j m_j, one trajectory after the other."""
    total, draws = torch.zeros((), dtype=torch.float64), 0
    for t in trajectories_of(batch):
        m = int(t["multiplicity"][0]) if "multiplicity" in t.keys() else 1  # noqa: SIM118
        total = total - m * t["importance_weight"][0] * log_prob(theta, t).sum() / len(t)
        draws += m
    return total / draws


def value_and_gradient(loss: Any, *args: Any) -> tuple[Tensor, Tensor]:
    theta = parameters()
    value = loss(theta, *args)
    return value.detach(), torch.autograd.grad(value, theta)[0]


@pytest.fixture
def every_ticket(monkeypatch: pytest.MonkeyPatch) -> int:
    """Replace the random numbers of the samplers by each possible outcome, equally often.

    Tickets run through all multiplicities; with each, uniforms run through the midpoints of
    ``repeats`` equal parts of [0, 1), which every trajectory's length divides.
    """
    repeats = math.lcm(*SIZES)

    def randint(high: int, size: tuple[int], *, generator: torch.Generator) -> Tensor:
        return torch.arange(high).repeat_interleave(size[0] // high)

    def rand(size: int, *, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return ((torch.arange(repeats, dtype=dtype) + 0.5) / repeats).repeat(size // repeats)

    monkeypatch.setattr(torch, "randint", randint)
    monkeypatch.setattr(torch, "rand", rand)
    return repeats


def test_each_ticket_is_one_copy_of_its_trajectory(every_ticket: int) -> None:
    data = dataset()
    batch = TrajectorySampler(data, sum(MULTIPLICITY)).sample()
    expected = data[data["multiplicity"] > 0]
    for key in ("observation", "multiplicity", "step", TRAJ_IDS):
        assert torch.equal(batch.get(key), expected.get(key))
    for ours, theirs in zip(
        value_and_gradient(weighted, batch), value_and_gradient(weighted, data), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_expected_step_loss_is_the_length_normalised_loss(every_ticket: int) -> None:
    data = dataset()
    batch = StepSampler(data, every_ticket * sum(MULTIPLICITY)).sample()
    chances = torch.bincount(batch["step"], minlength=len(data)) / len(batch)
    share = data["multiplicity"] / lengths(data).repeat_interleave(lengths(data))
    torch.testing.assert_close(chances, share / sum(MULTIPLICITY))
    for ours, theirs in zip(
        value_and_gradient(weighted, batch), value_and_gradient(weighted, data), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_both_expectations_through_the_loss_of_the_library(every_ticket: int) -> None:
    data = dataset().float()
    data[TRAJ_IDS] = dataset()[TRAJ_IDS]
    data["multiplicity"] = dataset()["multiplicity"]
    data["action"].tanh_()
    data["data_weight"] = torch.linspace(0.0, 2.0, len(data))
    torch.manual_seed(0)
    loss = ImportanceWeightedMLE(GaussianPolicy(4, 2, hidden=(8,)), proposal="cached")
    steps = StepSampler(data, every_ticket * sum(MULTIPLICITY)).sample()
    whole = TrajectorySampler(data, sum(MULTIPLICITY)).sample()
    gradients = []
    for batch in (data, whole, steps):
        value = loss(batch)["loss_iw_mle"]
        leaves = list(loss.actor_network_params.values(True, True))
        gradients.append([value, *torch.autograd.grad(value, leaves)])
    for other in gradients[1:]:
        for ours, theirs in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_batch_of_256_is_the_literal_batch() -> None:
    data = dataset()
    sampler = TrajectorySampler(data, 256, seed=3)
    for _ in range(3):
        batch = sampler.sample()
        drawn: list[TensorDictBase] = []
        for t in trajectories_of(batch):
            source = data[data.get(TRAJ_IDS) == t.get(TRAJ_IDS)[0]]
            drawn += [source] * int(t["multiplicity"][0])
        assert len(drawn) == 256
        for ours, theirs in zip(
            value_and_gradient(weighted, batch), value_and_gradient(literal, drawn), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_batches_hold_whole_distinct_trajectories_in_order() -> None:
    data = dataset(multiplicity=None)
    batch = TrajectorySampler(data, 4, seed=0).sample()
    ids = batch.get(TRAJ_IDS)
    assert bool((ids[1:] >= ids[:-1]).all())
    whole = data[torch.isin(data.get(TRAJ_IDS), ids)]
    assert torch.equal(batch["step"], whole["step"])
    assert batch["multiplicity"].dtype == torch.int64
    assert sum(int(t["multiplicity"][0]) for t in trajectories_of(batch)) == 4


def test_neighbours_with_equal_ids_are_told_apart() -> None:
    """As two collectors give them, whose first episodes both have the id 0."""
    data = dataset()
    sampler = TrajectorySampler(data, 16, seed=0)
    sizes = lengths(data)
    alike = data.clone()
    alike[TRAJ_IDS] = torch.zeros_like(data[TRAJ_IDS])
    alike[DONE] = torch.zeros(len(data), 1, dtype=torch.bool)
    alike[DONE][sizes.cumsum(0) - 1] = True
    assert torch.equal(lengths(alike), sizes)
    batch, other = sampler.sample(), TrajectorySampler(alike, 16, seed=0).sample()
    assert torch.equal(batch["step"], other["step"])
    assert torch.equal(lengths(batch), lengths(other))


def test_draws_follow_the_multiplicity() -> None:
    """Draws of one trajectory are binomial; 4 standard deviations."""
    n, total = 40_000, sum(MULTIPLICITY)
    batch = TrajectorySampler(dataset(), n, seed=0).sample()
    got = {int(t.get(TRAJ_IDS)[0]): int(t["multiplicity"][0]) for t in trajectories_of(batch)}
    assert sum(got.values()) == n
    for j, m in enumerate(MULTIPLICITY):
        p = m / total
        assert abs(got.get(2 * j + 5, 0) - n * p) <= 4 * math.sqrt(n * p * (1 - p))


def test_monte_carlo_step_loss_is_within_four_standard_errors() -> None:
    data, theta = dataset(), parameters().detach()
    term = -data["importance_weight"] * log_prob(theta, data)
    chance = data["multiplicity"] / lengths(data).repeat_interleave(lengths(data))
    chance = chance.double() / sum(MULTIPLICITY)
    mean = (chance * term).sum()
    deviation = (chance * (term - mean).square()).sum().sqrt()
    n, rounds = 1024, 40
    sampler = StepSampler(data, n, seed=0)
    batches = [next(sampler) for _ in range(rounds)]
    estimate = torch.stack(
        [-(b["importance_weight"] * log_prob(theta, b)).mean() for b in batches]
    ).mean()
    assert abs(estimate - mean) < 4 * deviation / math.sqrt(n * rounds)
    torch.testing.assert_close(mean, weighted(theta, data))
    seen = torch.cat([b["step"] for b in batches]).bincount(minlength=len(data))
    spread = (n * rounds * chance * (1 - chance)).sqrt()
    assert bool(((seen - n * rounds * chance).abs() <= 4 * spread).all())


def test_steps_are_trajectories_of_length_one() -> None:
    data = dataset()
    batch = StepSampler(data, 64).sample()
    assert batch.batch_size == torch.Size([64])
    assert torch.equal(batch.get(TRAJ_IDS), torch.arange(64))
    assert set(batch.keys(True, True)) == {
        "observation",
        "action",
        "ref_log_prob",
        "importance_weight",
        "step",
        TRAJ_IDS,
    }
    for key in ("observation", "action", "ref_log_prob", "importance_weight"):
        assert torch.equal(batch[key], data[key][batch["step"]])


@pytest.mark.parametrize("sampler", [TrajectorySampler, StepSampler])
def test_resumed_sampler_draws_the_same_batches(sampler: Any) -> None:
    first = sampler(dataset(), 8, seed=5)
    for _ in range(3):
        next(first)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    expected = [next(first) for _ in range(4)]
    second = sampler(dataset(), 8, seed=99)
    assert not torch.equal(sampler(dataset(), 8, seed=99).sample()["step"], expected[0]["step"])
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for one, other in zip(expected, second, strict=False):
        assert (one == other).all()


@pytest.mark.parametrize("sampler", [TrajectorySampler, StepSampler])
def test_state_of_another_run_is_refused(sampler: Any) -> None:
    state = sampler(dataset(), 8).state_dict()
    with pytest.raises(ValueError, match="batch_size=8, not 9"):
        sampler(dataset(), 9).load_state_dict(state)
    with pytest.raises(ValueError, match="multiplicity=12, not 6"):
        sampler(dataset(multiplicity=None), 8).load_state_dict(state)


@pytest.mark.parametrize("sampler", [TrajectorySampler, StepSampler])
def test_seed_decides_and_the_global_one_does_not(sampler: Any) -> None:
    def draws(seed: int) -> list[list[int]]:
        batches = sampler(dataset(), 3, seed=seed)
        return [next(batches)["step"].tolist() for _ in range(5)]

    torch.manual_seed(0)
    one = draws(1)
    torch.manual_seed(7)
    assert draws(1) == one
    assert draws(2) != one


@pytest.mark.parametrize("sampler", [TrajectorySampler, StepSampler])
def test_batches_contain_what_is_written_later(sampler: Any) -> None:
    data = dataset().exclude("importance_weight")
    drawer = sampler(data, 32)
    assert drawer.trajectories is data
    assert "importance_weight" not in drawer.sample().keys()  # noqa: SIM118
    data["importance_weight"] = torch.arange(len(data)).float()
    batch = drawer.sample()
    assert torch.equal(batch["importance_weight"], batch["step"].float())
    data["importance_weight"].mul_(-1)
    batch = drawer.sample()
    assert torch.equal(batch["importance_weight"], -batch["step"].float())


def test_masked_steps_are_not_sampled_and_stay_masked_in_trajectories() -> None:
    data = dataset(multiplicity=None)
    data[MASK] = torch.arange(len(data)) % 3 != 1
    data[MASK][3] = data[MASK][16] = True
    steps = StepSampler(data, 20_000, seed=0).sample()
    assert MASK not in steps.keys(True)
    seen = steps["step"].bincount(minlength=len(data))
    valid = data.get(MASK)
    assert bool((seen[~valid] == 0).all())
    ids = data.get(TRAJ_IDS)
    for i in ids.unique().tolist():
        own = valid & (ids == i)
        p = 1 / len(SIZES) / int(own.sum())
        assert bool(((seen[own] - 20_000 * p).abs() < 4 * math.sqrt(20_000 * p)).all())
    whole = TrajectorySampler(data, 50).sample()
    assert torch.equal(whole.get(MASK), valid[whole["step"]])
    data[MASK][3] = False
    with pytest.raises(ValueError, match="trajectory 1 has every step masked"):
        StepSampler(data, 4)
    # It does not matter where it is never drawn.
    data["multiplicity"] = (data.get(TRAJ_IDS) != 7).long()
    assert bool((StepSampler(data, 100).sample()["step"] != 3).all())


@pytest.mark.parametrize("sampler", [TrajectorySampler, StepSampler])
def test_one_trajectory_and_length_one(sampler: Any) -> None:
    lone = sampler(dataset([1], None), 6).sample()
    assert set(lone["step"].tolist()) == {0}
    singles = sampler(dataset([1] * 5, None), 100).sample()
    assert set(singles["step"].tolist()) == set(range(5))
    assert sampler(dataset([1] * 5, None), 1).sample().batch_size == (1,)


def test_curated_data_feeds_the_samplers() -> None:
    sizes = [2] * 20
    data = dataset(sizes, None)
    data["next", "reward"] = torch.arange(40.0)[:, None]
    bins = curate(data, cuts=(50, 90))
    steps = StepSampler(bins, 12_000, seed=0).sample()
    assert int(steps["step"].min()) >= 20
    top = int((steps["step"] >= 36).sum())
    # The best 2 of 10 count twice: 4 of 12 draws.
    assert abs(top - 4_000) < 4 * math.sqrt(12_000 * (1 / 3) * (2 / 3))


@pytest.mark.parametrize("sampler", [TrajectorySampler, StepSampler])
def test_bad_input(sampler: Any) -> None:
    data = dataset()
    with pytest.raises(ValueError, match="batch_size=0"):
        sampler(data, 0)
    with pytest.raises(ValueError, match=r"pack\(trajectories\)"):
        sampler(pad(data), 4)
    with pytest.raises(ValueError, match="not a single step"):
        sampler(data[:0], 4)
    with pytest.raises(ValueError, match="out of order"):
        sampler(data[[5, 1, 0]], 4)
    with pytest.raises(ValueError, match="0 for every trajectory"):
        sampler(dataset(multiplicity=[0] * 6), 4)
    with pytest.raises(ValueError, match="negative"):
        sampler(dataset(multiplicity=[3, 1, 1, -1, 1, 1]), 4)
    changed = dataset()
    changed["multiplicity"][1] = 7
    with pytest.raises(ValueError, match="changes within a trajectory, first at step 1"):
        sampler(changed, 4)
    changed["multiplicity"] = torch.ones(len(data))
    with pytest.raises(ValueError, match="must hold whole numbers, it holds torch.float32"):
        sampler(changed, 4)


@pytest.mark.parametrize(
    "key",
    ["multiplicity", "data_weight", "ref_log_prob", "observation", "action", ("next", "reward")],
)
def test_a_state_of_other_values_of_the_same_steps_is_refused(key: Any) -> None:
    """Also where they add up to the same."""

    def sampler(*values: int) -> TrajectorySampler:
        data = from_steps({"action": torch.ones(3, 1)}, torch.arange(3))
        data.set(key, torch.tensor(values).reshape(3, *[1] * (key in ("observation", "action"))))
        return TrajectorySampler(data, 4)

    state = sampler(1, 3, 1).state_dict()
    sampler(1, 3, 1).load_state_dict(state)
    for others in ((3, 1, 1), (2, 1, 2)):
        with pytest.raises(ValueError, match="this state is of a sampler with"):
            sampler(*others).load_state_dict(state)


def test_a_state_of_other_draws_is_refused() -> None:
    """A class of sampler and a mask change what is learned."""
    state = StepSampler(dataset(), 8).state_dict()
    masked = dataset()
    masked[MASK] = torch.arange(len(masked)) != 1
    others = {
        "class=StepSampler, not TransitionSampler": TransitionSampler(
            dataset(), 8, keys=["action"]
        ),
        "data=": StepSampler(masked, 8),
    }
    for message, sampler in others.items():
        with pytest.raises(ValueError, match=message):
            sampler.load_state_dict(state)


def test_a_reference_that_is_nan_where_masked_equals_itself() -> None:
    data = dataset(multiplicity=None)
    data[MASK] = torch.arange(len(data)) != 1
    data["ref_log_prob"][1] = math.nan
    StepSampler(data, 8).load_state_dict(StepSampler(data, 8).state_dict())


def test_another_machine_s_last_digits_of_the_reference_are_accepted() -> None:
    """Also where they round to another number of five digits, as beside 12.3445."""

    def sampler(change: float) -> StepSampler:
        reference = torch.tensor([2.5**0.5 - 1, 4.92225**0.5 - 1], dtype=torch.float64)
        data = from_steps({"action": torch.ones(2, 1)}, torch.arange(2))
        return StepSampler(data.set("ref_log_prob", reference + change), 4)

    state = sampler(-1e-8).state_dict()
    assert state["ref_log_prob"] == pytest.approx(12.3445)
    sampler(1e-8).load_state_dict(state)
    with pytest.raises(ValueError, match="ref_log_prob"):
        sampler(1e-2).load_state_dict(state)


def test_a_reference_that_syncs_have_written_since_is_that_of_the_first_run() -> None:
    """As psft writes it: a loop that starts anew has the reference of its beginning."""
    first = dataset()
    sampler = StepSampler(first, 8)
    first["ref_log_prob"].copy_(first["ref_log_prob"] - 3)
    StepSampler(dataset(), 8).load_state_dict(sampler.state_dict())
