"""Curation against Algorithm 2 written down literally in numpy."""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import nullcontext
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase

from iwsft.curation import curate, trajectory_returns, trajectory_scores
from iwsft.trajectory import (
    DONE,
    MASK,
    REWARD,
    TRAJ_IDS,
    from_steps,
    lengths,
    pack,
    pad,
)


def dataset(returns: list[float], sizes: list[int] | None = None) -> TensorDict:
    """Trajectories with given returns, each paid out at its last step; ids count in threes."""
    sizes = [1 + i % 4 for i in range(len(returns))] if sizes is None else sizes
    size = torch.tensor(sizes)
    steps = int(size.sum())
    reward = torch.zeros(steps, dtype=torch.float64)
    reward[size.cumsum(0) - 1] = torch.tensor(returns, dtype=torch.float64)
    return TensorDict(
        {
            "observation": torch.arange(steps).float()[:, None],
            "action": torch.zeros(steps, 1),
            "next": {"reward": reward[:, None]},
            "collector": {"traj_ids": (3 * torch.arange(len(sizes))).repeat_interleave(size)},
        },
        [steps],
    )


def counts(curated: TensorDictBase) -> dict[int, int]:
    """Multiplicity of each surviving trajectory, by its position in :func:`dataset`."""
    pairs = zip(curated.get(TRAJ_IDS).tolist(), curated["multiplicity"].tolist(), strict=True)
    found: dict[int, int] = {}
    for traj_id, multiplicity in pairs:
        assert found.setdefault(traj_id // 3, multiplicity) == multiplicity
    return found


def algorithm_2(returns: list[float], cuts: list[float], ties: str) -> Counter[int]:
    union: Counter[int] = Counter()
    for cut in cuts:
        threshold = np.percentile(np.array(returns), cut)
        for i, r in enumerate(returns):
            if r > threshold or (ties == ">=" and r == threshold):
                union[i] += 1
    return union


RETURNS = st.lists(
    st.one_of(st.integers(0, 2).map(float), st.integers(-999, 999).map(lambda x: x / 7)),
    min_size=1,
    max_size=60,
)
DISTINCT = st.lists(st.integers(-999, 999).map(float), min_size=1, max_size=60, unique=True)
CUTS = st.lists(st.floats(0.5, 99.5), min_size=1, max_size=4)


@settings(max_examples=150)
@given(RETURNS, CUTS, st.sampled_from([">", ">="]))
def test_percentile_ties_are_algorithm_2(
    returns: list[float], cuts: list[float], ties: Any
) -> None:
    expected = algorithm_2(returns, cuts, ties)
    data = dataset(returns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not expected:
            with pytest.raises(ValueError, match="curated set is empty"):
                curate(data, cuts=cuts, ties=ties)
            return
        got = curate(data, cuts=cuts, ties=ties)
    assert counts(got) == dict(expected)


@settings(max_examples=150)
@given(RETURNS, CUTS, st.integers(0, 5))
def test_rank_counts_nested_best_first(returns: list[float], cuts: list[float], seed: int) -> None:
    data = dataset(returns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = [counts(curate(data, cuts=[cut], seed=seed)) for cut in sorted(cuts)]
        all_cuts = counts(curate(data, cuts=cuts, seed=seed))
    for cut, one in zip(sorted(cuts), kept, strict=True):
        share = round((100 - cut) / 100 * len(returns), 9)
        assert len(one) == max(1, ceil(share))
        out = [r for i, r in enumerate(returns) if i not in one]
        assert not out or max(out) <= min(returns[i] for i in one)
    for lower, higher in zip(kept, kept[1:], strict=False):
        assert set(higher) <= set(lower)
    assert all_cuts == dict(sum((Counter(one) for one in kept), Counter()))


@settings(max_examples=50)
@given(DISTINCT, CUTS, st.randoms(use_true_random=False))
def test_rank_without_ties_ignores_order_and_seed(
    returns: list[float], cuts: list[float], random: Any
) -> None:
    order = list(range(len(returns)))
    random.shuffle(order)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = counts(curate(dataset(returns), cuts=cuts, seed=0))
        second = counts(curate(dataset([returns[i] for i in order]), cuts=cuts, seed=1))
    assert {returns[i]: m for i, m in first.items()} == {
        returns[order[i]]: m for i, m in second.items()
    }


@pytest.mark.parametrize(
    "cut", ["99.6", "99.7", "99.9", "99.9999999999", "90", "95", "98", "33.3", "0"]
)
@pytest.mark.parametrize("count", [1, 2, 10, 50, 202, 1000])
def test_rank_keeps_the_exact_count(cut: str, count: int) -> None:
    exact = ceil((100 - Fraction(cut)) / 100 * count)
    kept = curate(dataset([float(i) for i in range(count)], [1] * count), cuts=[float(cut)])
    assert len(counts(kept)) == max(1, exact)


@pytest.mark.parametrize("ties", ["rank", ">", ">="])
def test_quality_bins_of_the_paper(ties: Any) -> None:
    returns = np.random.default_rng(0).permutation(1000).astype(float).tolist()
    got = counts(curate(dataset(returns, [1] * 1000), cuts=(90, 95, 98), ties=ties))
    by_rank = sorted(got, key=lambda i: -returns[i])
    assert len(by_rank) == 100
    assert [got[i] for i in by_rank] == [3] * 20 + [2] * 30 + [1] * 50
    # halfcheetah's replay has 202 episodes.
    few = counts(curate(dataset(returns[:202], [1] * 202), cuts=(90, 95, 98), ties=ties))
    assert (len(few), sum(few.values())) == (21, 37)


def test_survivors_keep_their_steps_and_order() -> None:
    data = dataset([5.0, 1.0, 7.0, 6.0], [2, 3, 1, 4])
    data["ref_log_prob"] = torch.arange(10).float()
    got = curate(data, cuts=(50,))
    assert got["multiplicity"].dtype == torch.int64
    assert got["observation"].squeeze(-1).tolist() == [5.0, 6.0, 7.0, 8.0, 9.0]
    assert got["ref_log_prob"].tolist() == [5.0, 6.0, 7.0, 8.0, 9.0]
    assert got.get(TRAJ_IDS).tolist() == [6, 9, 9, 9, 9]
    assert "multiplicity" not in data.keys()  # noqa: SIM118


@pytest.mark.parametrize("cuts", [(), (0,)])
@pytest.mark.parametrize("ties", ["rank", ">", ">="])
def test_no_filter_is_all_data_once_without_a_copy(cuts: tuple[int, ...], ties: Any) -> None:
    data = dataset([1.0, 1.0, 0.0])
    got = curate(data, cuts=cuts, ties=ties)
    assert counts(got) == {0: 1, 1: 1, 2: 1}
    assert got["observation"].data_ptr() == data["observation"].data_ptr()
    assert "multiplicity" not in data.keys()  # noqa: SIM118


def test_sparse_returns() -> None:
    """5 successes in 100: '>' and '>=' fail each in its way, rank keeps them all."""
    returns = [1.0 if i % 20 == 0 else 0.0 for i in range(100)]
    with pytest.warns(UserWarning, match=r"among 95 equal scores \(0\): 5 of the 10 trajectories"):
        rank = counts(curate(dataset(returns), cuts=(90,)))
    assert len(rank) == 10
    assert {0, 20, 40, 60, 80} <= set(rank)
    with pytest.warns(UserWarning, match="keeps all 100 trajectories"):
        assert len(counts(curate(dataset(returns), cuts=(90,), ties=">="))) == 100
    mostly = [1.0 - r for r in returns]
    with pytest.raises(ValueError, match=r"cut 90 .*95 of 100 scores are the maximum.*ties='rank'"):
        curate(dataset(mostly), cuts=(95, 90), ties=">")
    with pytest.warns(UserWarning, match="10 of the 10 trajectories kept are drawn by chance"):
        assert len(counts(curate(dataset(mostly), cuts=(90,)))) == 10


@pytest.mark.filterwarnings("ignore:cut 75 falls among 10 equal scores")
def test_chance_among_equals_is_seeded_and_fair() -> None:
    returns = [0.0] * 10 + [1.0] * 10
    draws = [counts(curate(dataset(returns), cuts=(75,), seed=s)) for s in range(200)]
    assert draws[3] == counts(curate(dataset(returns), cuts=(75,), seed=3))
    assert draws[0] == counts(curate(dataset(returns), cuts=(75,)))
    often = Counter(i for draw in draws for i in draw)
    assert set(often) == set(range(10, 20))
    # Each of the 10 is kept with chance 1/2: 200 draws, standard deviation 7.07.
    assert all(abs(often[i] - 100) < 4 * 7.08 for i in often)


REACHED = [1.0] * 6 + [0.0] * 4


@pytest.mark.parametrize(
    ("returns", "cuts", "ties", "message"),
    [
        ([3.0] * 8, (50,), "rank", "all 8 scores are 3: .*by chance"),
        ([3.0] * 2, (50,), "rank", "all 2 scores are 3"),
        ([3.0] * 200, (1,), "rank", "all 200 scores are 3"),
        # 6 of 10 reach the goal: the best 40 % are a random sample of them.
        (REACHED, (60,), "rank", r"cut 60 falls among 6 .* \(1\): 4 of the 4"),
        ([1.0] * 3 + [0.0], (50,), "rank", r"cut 50 falls among 3 equal scores \(1\): 2 of the 2"),
        ([1.0, 1.0], (50,), ">=", "cut 50 with ties='>=' keeps all 2 "),
        ([3.0] * 8, (1,), ">=", "cut 1 with ties='>=' keeps all 8 "),
        # 1 of 20 reaches the goal: the 90th percentile is still 0, and all are at least 0.
        ([1.0] + [0.0] * 19, (90,), ">=", "cut 90 .* keeps all 20 .* 19 of the scores"),
        ([0.0] * 8 + [1.0] * 2, (50, 95), ">", "cut 95 with ties='>' keeps no trajectory"),
        ([1.0, 2.0, 3.0], (0.9,), "rank", r"did you mean \(90.0,\)"),
    ],
)
def test_cuts_that_do_not_do_what_they_say_warn(
    returns: list[float], cuts: Any, ties: Any, message: str
) -> None:
    with pytest.warns(UserWarning, match=message) as warned:
        curate(dataset(returns), cuts=cuts, ties=ties)
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ("returns", "cuts", "ties"),
    [
        ([3.0] * 8, (0,), "rank"),
        ([3.0] * 8, (0,), ">="),
        (REACHED, (40,), "rank"),
        (REACHED, (60,), ">="),
        # Two of the five that are kept are less than half, and a tie of two does not matter.
        ([5.0, 4.0, 3.0] + [1.0] * 3 + [0.0] * 4, (50,), "rank"),
        ([3.0, 2.0, 2.0, 1.0], (50,), "rank"),
        ([1.0, 2.0, 3.0], (1,), "rank"),
    ],
)
def test_cuts_that_do_what_they_say(returns: list[float], cuts: Any, ties: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sum(counts(curate(dataset(returns), cuts=cuts, ties=ties)).values())


def test_the_top_tenth_is_kept_unless_cuts_are_given() -> None:
    assert counts(curate(dataset([float(i) for i in range(100)]))) == dict.fromkeys(
        range(90, 100), 1
    )


@pytest.mark.parametrize("ties", ["rank", ">="])
def test_one_trajectory_is_kept(ties: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert counts(curate(dataset([3.0], [1]), cuts=(90, 98), ties=ties)) == {0: 2}


def test_padded_and_packed_agree() -> None:
    data = dataset([5.0, 1.0, 7.0, 6.0], [2, 3, 1, 4])
    padded = pad(data)
    padded[REWARD][~padded.get(MASK)] = 1e9
    packed, other = curate(data, cuts=(50,)), curate(padded, cuts=(50,))
    assert torch.equal(packed["observation"], other["observation"])
    assert torch.equal(packed["multiplicity"], other["multiplicity"])
    assert trajectory_returns(pack(padded)).tolist() == [5.0, 1.0, 7.0, 6.0]


def test_masked_steps_do_not_count_in_the_return() -> None:
    data = dataset([5.0, 1.0], [3, 2])
    data[REWARD][0] = 100.0
    data[MASK] = torch.tensor([False, True, True, True, True])
    assert trajectory_returns(data).tolist() == [5.0, 1.0]


@pytest.mark.parametrize(("ended", "told"), [(3, False), (2, True), (0, False)])
@pytest.mark.parametrize("score", ["return", "length"])
def test_parts_of_episodes_beside_whole_ones_are_told(ended: int, told: bool, score: str) -> None:
    """Where a step costs 1, the part of an episode that a collector has so far looks best."""
    ids = torch.tensor([0] * 5 + [1] * 5 + [2] * 2)
    done = torch.zeros(12, 1, dtype=torch.bool)
    done[[4, 9, 11][:ended]] = True
    trajectories = from_steps({REWARD: -torch.ones(12), DONE: done}, ids)
    matched = "1 of 3 trajectories do not end: .*, so their .* is that of a part"
    with pytest.warns(UserWarning, match=matched) if told else nullcontext():
        best = curate(trajectories, cuts=(60,), score=score)
    assert score == "length" or 2 in best[TRAJ_IDS]


def test_returns_are_float64_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    reward = torch.rand(40_000, 1, generator=generator)
    data = TensorDict(
        {
            "next": {"reward": reward},
            "collector": {"traj_ids": torch.arange(2).repeat_interleave(20_000)},
        },
        [40_000],
    )
    expected = np.array([float(np.sum(r.astype(np.float64))) for r in np.split(reward.numpy(), 2)])
    assert trajectory_returns(data).dtype == torch.float64
    np.testing.assert_allclose(trajectory_returns(data).numpy(), expected, rtol=1e-13)


def test_other_scores() -> None:
    data = dataset([1.0, 2.0, 3.0, 4.0], [7, 1, 5, 2])
    assert counts(curate(data, cuts=(50,), score="length")) == {0: 1, 2: 1}
    data["reward_model", "score"] = torch.tensor([0.5, 0.9, 0.1, 0.7]).repeat_interleave(
        lengths(data)
    )
    assert counts(curate(data, cuts=(50,), score=("reward_model", "score"))) == {1: 1, 3: 1}
    flat = data.flatten_keys(".").rename_key_("reward_model.score", "score")
    flat[TRAJ_IDS] = data[TRAJ_IDS]
    flat["score"] = flat["score"][:, None]
    assert counts(curate(flat, cuts=(50,), score="score")) == {1: 1, 3: 1}
    data["small"] = torch.ones(len(data))
    for score in ("return", "length", "small", lengths):
        assert trajectory_scores(data, score).dtype == torch.float64
    with_gradient = data["observation"].requires_grad_().sum() * 0
    for ties in ("rank", ">"):
        survivors = curate(
            data,
            cuts=(50,),
            score=lambda td: with_gradient - trajectory_returns(td),
            ties=ties,  # type: ignore[arg-type]
        )
        assert counts(survivors) == {0: 1, 1: 1}


def test_invalid_scores_are_refused() -> None:
    data = dataset([1.0, 2.0, float("nan"), 4.0], [2, 1, 5, 2])
    with pytest.raises(ValueError, match=r"\(return\) of trajectory 2 \(id 6\) is nan, and 1 of 4"):
        curate(data)
    with pytest.raises(KeyError, match="did you mean return"):
        curate(data, score="returns")
    with pytest.raises(KeyError, match="next.reward"):
        curate(data, score="value")
    with pytest.raises(KeyError, match="score next is unknown; there are return, length"):
        curate(data, score="next")
    with pytest.raises(ValueError, match="changes within a trajectory, first at step 1"):
        curate(data, score="observation")
    with pytest.raises(ValueError, match=r"gave \[10\] for 4"):
        curate(data, score=lambda td: td["observation"][:, 0])
    with pytest.raises(KeyError, match="the return needs"):
        curate(data.exclude("next"))
    wide = data.exclude("next")
    wide["next", "reward"] = torch.zeros(10, 2)
    with pytest.raises(ValueError, match=r"\[10, 2\]"):
        curate(wide)
    score = torch.tensor([0.5, torch.inf, 0.0, 0.0]).repeat_interleave(lengths(data))
    data["score"] = score
    with pytest.raises(ValueError, match=r"trajectory 1 \(id 3\) is inf"):
        curate(data, score="score")


def test_settings_out_of_range() -> None:
    data = dataset([1.0, 2.0])
    for cut in (100, -1, float("nan")):
        with pytest.raises(ValueError, match="not a percentile"):
            curate(data, cuts=(cut,))
    with pytest.raises(TypeError, match="cut '90' must be a number"):
        curate(data, cuts=("90",))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="beta='1' must be a number"):
        curate(data, weight="softmax", beta="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sequence of percentiles"):
        curate(data, cuts=90)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ties='>>' is unknown; it is one of rank, >, >="):
        curate(data, ties=">>")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="curate the data they come from"):
        curate(curate(data, cuts=(0,)))
    with pytest.raises(TypeError, match="trajectories are a TensorDict, not a dict"):
        curate(data.to_dict())
    with pytest.raises(ValueError, match="not a single step"):
        curate(data[:0])
    with pytest.raises(ValueError, match="out of order"):
        curate(data[[2, 1, 0]])


@pytest.mark.parametrize("ties", ["rank", ">", ">="])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_rewards_of_any_dtype_and_with_gradient(dtype: torch.dtype, ties: Any) -> None:
    data = dataset([4.0, 1.0, 3.0, 2.0, 5.0])
    expected = counts(curate(data, cuts=(50, 80), ties=ties))
    reward = data[REWARD].to(dtype)
    data[REWARD] = reward.requires_grad_() if dtype.is_floating_point else reward
    assert counts(curate(data, cuts=(50, 80), ties=ties)) == expected


@pytest.mark.parametrize("unit", [1e-310, 1e-200, 1.0, 1e200, 1e307])
def test_standard_scores_do_not_depend_on_the_unit(unit: float) -> None:
    """Also of products of probabilities, whose squares are below all numbers."""
    scores = torch.tensor([3.0, -1.0, 4.0, 6.0], dtype=torch.float64)
    data = from_steps({}, torch.arange(4))
    curated = curate(data, cuts=(), score=lambda _: scores * unit)
    expected = (scores - scores.mean()) / scores.std(correction=0)
    torch.testing.assert_close(curated["standard_score"], expected.float())
