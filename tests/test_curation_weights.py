"""Data weights that curation makes of scores."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from iwsft import GaussianPolicy, ImportanceWeightedMLE
from iwsft.curation import curate
from iwsft.trajectory import DATA_WEIGHT, MULTIPLICITY, TRAJ_IDS, lengths, per_trajectory
from tests.test_curation import dataset


def test_softmax_weights_give_reward_weighted_regression() -> None:
    """Loss and gradient are those of a plain one: sum_j softmax(R / beta)_j (-log p(tau_j))."""
    returns = torch.tensor([1.0, -2.0, 0.5, 3.0])
    data = dataset(returns.tolist())
    data = data.float().set(TRAJ_IDS, data[TRAJ_IDS])
    policy = GaussianPolicy(1, 1, hidden=(4,))
    loss = ImportanceWeightedMLE(
        policy, proposal="reference", length_normalize=False, functional=False
    )
    weighted = curate(data, cuts=(), weight="softmax", beta=1.5)
    log_prob = policy.log_prob(data.copy())
    sizes = lengths(data).tolist()
    of_trajectory = torch.stack([part.sum() for part in log_prob.split(sizes)])
    plain = -((returns / 1.5).softmax(0) * of_trajectory).sum()
    ours = loss(weighted)["loss_iw_mle"]
    for a, b in zip(
        (ours, *torch.autograd.grad(ours, [*policy.parameters()])),
        (plain, *torch.autograd.grad(plain, [*policy.parameters()])),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_weights_of_the_survivors() -> None:
    data = dataset([1.0, 4.0, 2.0, 3.0])
    assert curate(data).get(DATA_WEIGHT, default=None) is None
    best = curate(data, cuts=(0, 50), weight="softmax", beta=2.0)
    weight, draws = (per_trajectory(best, key).double() for key in (DATA_WEIGHT, MULTIPLICITY))
    ratio = torch.tensor([0.0, 1.5, 0.5, 1.0], dtype=torch.float64).exp()
    torch.testing.assert_close(weight / weight[0], ratio, rtol=1e-6, atol=0)
    assert (weight * draws).sum().item() == pytest.approx(draws.sum().item())
    assert weight.min() > 0 and best[DATA_WEIGHT].dtype == torch.float32
    # Scores of any size.
    huge = curate(dataset([1e6, 0.0]), cuts=(), weight="softmax", beta=1e-3)
    assert per_trajectory(huge, DATA_WEIGHT).tolist() == [2.0, 0.0]
    linear = curate(data, cuts=(50,), weight="linear")
    assert per_trajectory(linear, DATA_WEIGHT).tolist() == [4.0, 3.0]
    centred = curate(data, cuts=(), weight=lambda scores: scores - scores.mean())
    assert per_trajectory(centred, DATA_WEIGHT).tolist() == [-1.5, 1.5, -0.5, 0.5]


def test_trajectories_that_count_already_weigh_as_often_as_they_count() -> None:
    """As if each stood in the data as often as it counts."""
    scores, counts = [1.0, 900.0, 2.0, 3.0], [2, 0, 1, 3]
    data = dataset(scores)
    count = torch.tensor(counts).repeat_interleave(lengths(data))
    counted = data.set(MULTIPLICITY, count)
    ours = curate(counted, cuts=(), weight="softmax", beta=2.0)
    repeated = dataset([s for s, c in zip(scores, counts, strict=True) for _ in range(c)])
    plain = per_trajectory(curate(repeated, cuts=(), weight="softmax", beta=2.0), DATA_WEIGHT)
    assert per_trajectory(ours, MULTIPLICITY).tolist() == [2, 1, 3]
    torch.testing.assert_close(per_trajectory(ours, DATA_WEIGHT), plain[[0, 2, 3]])
    with pytest.raises(ValueError, match="these hold 'multiplicity' already"):
        curate(counted, cuts=(50,))
    with pytest.raises(ValueError, match="all 4 trajectories count 0 times"):
        curate(counted.set(MULTIPLICITY, 0 * count), cuts=())


def test_a_beta_that_leaves_one_trajectory_is_told() -> None:
    data = dataset([float(score) for score in range(20)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curate(data, cuts=(), weight="softmax", beta=5.0)
    with pytest.warns(UserWarning, match="beta=0.1 gives one of 20 trajectories 100% of the weig"):
        weighted = curate(data, cuts=(), weight="softmax", beta=0.1)
    assert per_trajectory(weighted, DATA_WEIGHT)[-1] / 20 > 0.99


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"weight": "softmax"}, "beta=None: weight='softmax' needs a positive one"),
        ({"weight": "softmax", "beta": 0.0}, "beta=0.0"),
        ({"weight": "linear", "beta": 1.0}, "beta=1.0"),
        ({"beta": 1.0}, "beta=1.0"),
        ({"weight": "square"}, "weight='square' is neither"),
        ({"weight": lambda scores: scores[:1]}, r"gave shape \[1\]; there are 3 trajectories"),
        ({"weight": lambda scores: scores / 0}, "is NaN, infinite or beyond float32 in 3 places"),
        ({"weight": lambda scores: 0 * scores}, "is 0 everywhere"),
    ],
)
def test_weights_that_are_refused(settings: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        curate(dataset([1.0, 2.0, 3.0]), cuts=(), **settings)
    weighted = curate(dataset([1.0, 2.0]), cuts=(), weight="linear").exclude(MULTIPLICITY)
    assert torch.equal(curate(weighted, cuts=())[DATA_WEIGHT], weighted[DATA_WEIGHT])
    with pytest.raises(ValueError, match="these hold 'data_weight' already"):
        curate(weighted, cuts=(), weight="linear")
