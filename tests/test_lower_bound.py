"""The exponent that the scores choose, against a plain loop in float64, and its invariances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor

from iwsft import (
    GaussianPolicy,
    HardSync,
    ImportanceWeightedMLE,
    ImportanceWeights,
    annotate_reference,
    curate,
)
from iwsft.curation import join
from iwsft.diagnostics import diagnose
from iwsft.lower_bound import EXPONENTS, Choice, LowerBound
from iwsft.samplers import StepSampler, TrajectorySampler
from iwsft.training import Schedule, fit
from iwsft.trajectory import REWARD, STANDARD_SCORE, Segments, from_steps
from iwsft.weights import ClipWeight, Temperature, TemperWeight

Array = NDArray[np.float64]
# Log-weight, multiplicity and score of each trajectory.
TRAJECTORIES = st.lists(
    st.tuples(st.floats(-20, 20, width=32), st.integers(1, 3), st.floats(-3, 5, width=32)),
    min_size=2,
    max_size=12,
)


def choose(log_weight: Any, m: Any, score: Any) -> tuple[Array, Choice]:
    """Weights and choice of the library."""
    columns = torch.tensor(log_weight), torch.tensor(m, dtype=torch.float64), torch.tensor(score)
    log, choice = LowerBound()(*columns)
    return log.double().exp().numpy(), choice


def odds(p: float) -> float:
    return p / (1 - p) if p < 1 else np.inf


def promises(log_weight: Any, m: Any, score: Any) -> list[tuple[float, float, float, Array]]:
    """Gain, variance, n and weights of every exponent, trajectory by trajectory."""
    out: list[tuple[float, float, float, Array]] = []
    p0 = [count / sum(m) for count in m]
    for alpha in EXPONENTS:
        powers = [np.exp(np.float64(alpha) * (x - max(log_weight))) for x in log_weight]
        total = sum(count * w for count, w in zip(m, powers, strict=True))
        p = [count * w / total for count, w in zip(m, powers, strict=True)]
        n = 1 / sum(x * x for x in p)
        gain = sum((x - y) * z for x, y, z in zip(p, p0, score, strict=True))
        variance = sum((odds(x) - odds(y)) ** 2 for x, y in zip(p, p0, strict=True))
        out.append((gain, variance, n, np.array(powers) * sum(m) / total))
    return out


def bounds(log_weight: Any, m: Any, score: Any) -> list[tuple[float, float, Array]]:
    """Bound, n and weights of every exponent."""
    return [(gain - v**0.5, n, w) for gain, v, n, w in promises(log_weight, m, score)]


@settings(max_examples=100)
@given(data=TRAJECTORIES)
def test_it_is_the_best_of_a_plain_loop(data: list[tuple[float, int, float]]) -> None:
    columns = [list(column) for column in zip(*data, strict=True)]
    weight, choice = choose(*columns)
    table = bounds(*columns)
    alpha = float(choice.exponent)
    if len(set(columns[2])) == 1:
        assert alpha == 0
    else:
        assert float(choice.gain_bound) >= max(bound for bound, *_ in table) - 1e-12
    bound, n, truth = table[EXPONENTS.index(alpha)]
    np.testing.assert_allclose(choice[1:], [n, bound], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(weight, truth, rtol=2e-3, atol=1e-30)


def test_the_error_is_what_leaving_one_out_changes() -> None:
    rng = np.random.default_rng(0)
    p, score = rng.dirichlet(np.ones(6)), rng.normal(size=6)
    for j in range(6):
        rest = np.average(np.delete(score, j), weights=np.delete(p, j))
        assert p @ score - rest == pytest.approx(odds(p[j]) * (score[j] - p @ score))


@settings(max_examples=100)
@given(data=TRAJECTORIES)
def test_no_trajectory_takes_all(data: list[tuple[float, int, float]]) -> None:
    # The gain is at most the range of the scores, and its error at least the change of the odds.
    log_weight, m, score = (list(column) for column in zip(*data, strict=True))
    p0 = np.array(m) / sum(m)
    weight, _ = choose(log_weight, m, score)
    growth = [odds(p * w) - odds(p) for p, w in zip(p0, weight, strict=True)]
    assert max(growth) <= np.ptp(score) + 1e-3


def test_a_lone_trajectory_keeps_its_weight() -> None:
    weight, choice = choose([3.0], [2], [1.5])
    assert weight.tolist() == [1.0] and [float(x) for x in choice] == [0, 1, 0]


def test_it_sharpens_where_likely_trajectories_are_good() -> None:
    log_weight, m = np.linspace(-2, 2, 100, dtype=np.float32), np.ones(100)
    good, bad = (choose(log_weight, m, sign * log_weight)[1] for sign in (1, -1))
    assert float(good.exponent) > 0 and float(bad.exponent) == 0
    assert float(bad.effective_trajectories) == pytest.approx(100)


@settings(max_examples=30)
@given(data=TRAJECTORIES, factor=st.sampled_from([-64.0, 8.0, 512.0]))
def test_a_common_factor_of_the_weights_changes_nothing(
    data: list[tuple[float, int, float]], factor: float
) -> None:
    # Quarters, so that sums with the factor are exact.
    log_weight = [round(4 * x) / 4 for x, *_ in data]
    m, score = ([row[i] for row in data] for i in (1, 2))
    ours, theirs = choose(log_weight, m, score), choose([x + factor for x in log_weight], m, score)
    assert ours[1] == theirs[1]
    np.testing.assert_array_equal(ours[0], theirs[0])


def test_copies_count_as_draws_but_not_as_other_trajectories() -> None:
    log_weight, score = [0.0, 0.25, 0.5], [1.0, 2.0, 4.0]
    once = choose(log_weight, [2, 2, 2], score)[1]
    assert once == choose(log_weight, [1, 1, 1], score)[1]
    copies = choose(2 * log_weight, [1] * 6, 2 * score)[1]
    # The gain of twice as many trajectories is the same, and its error smaller.
    assert float(copies.gain_bound) > float(once.gain_bound)


def trajectories(returns: Any, length: int = 4) -> TensorDict:
    """Random steps, annotated; the reward of every step is the trajectory's return."""
    count, generator = len(returns), torch.Generator().manual_seed(3)
    steps = {
        "observation": torch.randn(count * length, 3, generator=generator),
        "action": torch.randn(count * length, 2, generator=generator).tanh(),
        REWARD: torch.as_tensor(returns).double().repeat_interleave(length)[:, None],
    }
    data = from_steps(steps, torch.arange(count).repeat_interleave(length))
    torch.manual_seed(9)
    return annotate_reference(GaussianPolicy(3, 2), data)


def standard_scores(data: Any) -> Tensor:
    return data.get(STANDARD_SCORE)[::4]


def test_scores_are_standardised_over_all_data() -> None:
    returns = np.random.default_rng(0).normal(size=40)
    best = curate(trajectories(returns), cuts=(80,))
    truth = (returns - returns.mean()) / returns.std()
    survivors = returns >= np.sort(returns)[-8]
    np.testing.assert_allclose(standard_scores(best), truth[survivors], rtol=1e-5)
    # Shift and scale of the returns change nothing.
    other = curate(trajectories(1000 * returns - 7), cuts=(80,))
    np.testing.assert_allclose(standard_scores(other), standard_scores(best), rtol=1e-5)
    assert bool((standard_scores(curate(trajectories(np.full(5, 0.1)), cuts=(0,))) == 0).all())
    # Each part of a joined set has its own; a part that is not curated has none.
    assert standard_scores(join(best, other)).tolist() == [
        *standard_scores(best).tolist(),
        *standard_scores(other).tolist(),
    ]
    assert STANDARD_SCORE not in join(best, trajectories([1.0, 2.0]))


def test_others_judge_in_place_of_the_weighed() -> None:
    """Right and wrong answers choose the exponent of right ones, whose scores are equal."""
    generator = np.random.default_rng(3)
    right = generator.random(200) < 0.5
    judges = generator.normal(np.where(right, 1.0, -1.0), 0.5)
    score = (right - right.mean()) / right.std()
    # The last one is likelier than any judge.
    own, m = np.append(np.linspace(-1.0, 1.0, 49), 30.0), [1, 2] * 25
    columns = (torch.tensor(x, dtype=torch.float64) for x in (judges, np.ones(200), score))
    judged = LowerBound().judge(*columns)
    log, choice = judged(*(torch.tensor(x, dtype=torch.float64) for x in (own, m, np.ones(50))))
    promised = promises(judges.tolist(), [1] * 200, score.tolist())
    weighed = promises(np.minimum(own, judges.max()).tolist(), m, [1.0] * 50)
    bound = [j[0] - (j[1] + w[1]) ** 0.5 for j, w in zip(promised, weighed, strict=True)]
    best = int(np.argmax(bound))
    assert best > 0 and float(choice.exponent) == EXPONENTS[best]
    np.testing.assert_allclose(float(choice.gain_bound), bound[best], rtol=1e-9)
    np.testing.assert_allclose(log.exp().numpy(), weighed[best][3], rtol=1e-9)
    # Judges that are all right promise nothing.
    level = LowerBound().judge(*(torch.tensor(x) for x in (judges, np.ones(200), np.ones(200))))
    assert float(level(*(torch.tensor(x) for x in (own, m, np.ones(50))))[1].exponent) == 0


def test_judges_choose_between_the_other_transforms_of_a_chain() -> None:
    """They see what comes before their transform, and the chain keeps what comes after."""
    x, share, score = torch.linspace(-2, 3, 12), torch.ones(12), torch.arange(12) % 3 - 1.0
    segments = Segments(x.shape, torch.arange(12) // 2, None, 12)
    before, after = [TemperWeight(0.5), ClipWeight(max=3.0)], [ClipWeight(max=5.0)]
    chain = ImportanceWeights([Temperature(3.0)], "mean", [*before, LowerBound(), *after])
    judged = chain.judge(x, segments, share / 2, segments.spread(segments.mean(score)))
    assert [*judged.trajectory[:2], *judged.trajectory[3:]] == [*before, *after]
    of_trajectory = (1.5 * segments.mean(x)).clamp(max=np.log(3.0))
    truth = LowerBound().judge(of_trajectory, segments.sum(share / 2), segments.mean(score)).judged
    for ours, expected in zip(judged.trajectory[2].judged, truth, strict=True):
        torch.testing.assert_close(ours, expected)


def test_data_without_scores_name_the_way_out() -> None:
    loss = ImportanceWeightedMLE(
        GaussianPolicy(3, 2), importance_weights=ImportanceWeights.auto(), proposal="current"
    )
    assert "standard_score" in loss.in_keys
    with pytest.raises(KeyError, match=r"standard_score.*curate"):
        loss(trajectories([1.0, 2.0]))


AUTO: dict[str, Any] = {"importance_weights": ImportanceWeights.auto(), "proposal": "cached"}


def train(
    data: TensorDict, folder: Path | None = None, steps: int = 40, **settings: Any
) -> GaussianPolicy:
    """Fine-tune a policy on steps of a curated set."""
    torch.manual_seed(9)
    policy = GaussianPolicy(3, 2)
    loss = ImportanceWeightedMLE(policy, **settings)
    updater = HardSync(loss, every=7, trajectories=data) if loss.proposal == "cached" else None
    sampler, schedule = StepSampler(data, 32, seed=1), Schedule(steps, lr=3e-3, decay="constant")
    fit(loss, sampler, schedule, updater=updater, folder=folder, checkpoint_every=10)
    return policy


def assert_equal(ours: GaussianPolicy, theirs: GaussianPolicy) -> None:
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def exponent(policy: GaussianPolicy, data: TensorDict) -> float:
    """The exponent that a sync would choose."""
    loss = ImportanceWeightedMLE(policy, **AUTO | {"proposal": "current"})
    return diagnose(loss, data)["exponent"]


def test_without_a_choice_training_is_that_of_sft_to_the_bit() -> None:
    data = curate(trajectories(np.full(20, 1.0)), cuts=(0,))
    policy = train(data, **AUTO)
    assert_equal(policy, train(data, proposal="reference"))
    assert exponent(policy, data) == 0


def test_a_resumed_run_chooses_the_same(tmp_path: Path) -> None:
    data = curate(trajectories(np.arange(200.0)), cuts=(0, 50))
    whole = train(data.clone(), **AUTO)
    # 20 updates end in the middle of a window.
    train(data.clone(), tmp_path, 20, **AUTO)
    assert_equal(train(data.clone(), tmp_path, **AUTO), whole)
    assert exponent(whole, data) > 0


def test_a_batch_of_trajectories_chooses_for_itself() -> None:
    data = curate(trajectories(np.arange(30.0)), cuts=(0, 50))
    policy = train(data, **AUTO)
    loss = ImportanceWeightedMLE(policy, **AUTO | {"proposal": "current"})
    batch = TrajectorySampler(data, 16, seed=0).sample()
    ratio = (loss.log_prob(batch) - batch["ref_log_prob"]).detach().double().split(4)
    columns = (
        [float(part.mean()) for part in ratio],
        batch["multiplicity"][::4].tolist(),
        standard_scores(batch).tolist(),
    )
    _, _, truth = max(bounds(*columns), key=lambda row: row[0])
    weight = loss.terms(batch).log_weight.exp()[::4]
    np.testing.assert_allclose(weight.numpy(), truth, rtol=1e-3, atol=1e-30)
