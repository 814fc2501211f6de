"""Diagnostics of the weights, against numpy, scipy and brute force."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from iwsft import EMA, GaussianPolicy, ImportanceWeightedMLE, ImportanceWeights, weights
from iwsft.diagnostics import (
    QUANTILES,
    bound_gap,
    diagnose,
    pareto_k,
    rank_correlation,
    top_share,
    weight_quantiles,
    weighted_mean,
)
from iwsft.trajectory import from_steps, pad
from iwsft.weights import log_ess


@settings(max_examples=60)
@given(
    data=st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 6)), min_size=1, max_size=25),
    shape=st.sampled_from(["flat", "row"]),
)
def test_weight_quantiles_are_those_of_the_repeated_sample(
    data: list[tuple[int, int]], shape: str
) -> None:
    assume(any(m for _, m in data))
    w, m = (torch.tensor(column) for column in zip(*data, strict=True))
    w = w.float()
    if shape == "row":
        w, m = w[None], m[None]
    repeated = np.repeat([x for x, _ in data], [c for _, c in data])
    probabilities = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
    truth = np.quantile(repeated, probabilities, method="inverted_cdf")
    # Counts matter up to a factor only.
    for count in (m, m.double() / 7):
        ours = weight_quantiles(w, count, probabilities)
        assert ours.tolist()[1:] == truth.tolist()[1:]
        assert ours.dtype == torch.float32


PAIRS = st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.integers(0, 90))


@settings(max_examples=60)
@given(data=st.lists(PAIRS, min_size=2, max_size=12))
def test_rank_correlation_and_heaviest_share_are_those_of_the_repeated_sample(
    data: list[tuple[int, int, int]],
) -> None:
    assume(any(m for *_, m in data))
    x, y, m = (torch.tensor(column) for column in zip(*data, strict=True))
    counted = m > 0
    repeated = [np.repeat(each.numpy(), m.numpy()) for each in (x, y)]
    ours = float(rank_correlation(x[counted], y[counted].float(), m[counted] / 1.0))
    if any((each == each[0]).all() for each in repeated):
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(stats.spearmanr(*repeated).statistic, abs=1e-12)
    weight = np.sort(np.exp(repeated[0]))[::-1]
    heaviest = math.ceil(len(weight) / 100)
    truth = weight[:heaviest].sum() / weight.sum()
    # Shares of the steps add up to whole numbers but for rounding.
    for error in (0.0, 1e-12):
        assert float(top_share(x.exp(), m + error * counted)) == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("k", [0.1, 0.5, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("location", [0.0, 3.0])
def test_pareto_k_finds_the_shape_of_a_pareto_tail(k: float, location: float) -> None:
    n = 40_000
    estimates = []
    for seed in range(8):
        sample = stats.genpareto.rvs(k, loc=location, size=n, random_state=seed)
        estimates.append(pareto_k(torch.from_numpy(sample)))
    tail = int(3 * math.sqrt(n))
    # Standard error of the shape is (1 + k) / sqrt(tail); the prior pulls by 10 draws of k = 0.5.
    expected = (tail * k + 10 * 0.5) / (tail + 10)
    error = (1 + k) / math.sqrt(tail)
    assert np.mean(estimates) == pytest.approx(expected, abs=4 * error / math.sqrt(8))
    assert np.std(estimates) < 2 * error


def test_pareto_k_tells_light_tails_from_heavy_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    light = pareto_k(torch.rand(10_000, generator=generator))
    middle = pareto_k(torch.randn(10_000, generator=generator).exp())
    heavy = pareto_k((4 * torch.randn(10_000, generator=generator)).exp())
    # A uniform tail has shape -1, one of log-normals grows with their spread.
    assert light < -0.8 and light < middle < heavy and heavy > 0.7
    scaled = pareto_k(1e-3 * torch.rand(10_000, generator=torch.Generator().manual_seed(0)))
    assert scaled == pytest.approx(light, abs=1e-3)


def zhang_stephens(excess: list[float]) -> float:
    """Their estimate of the shape, term by term (with the denser grid of PSIS)."""
    n = len(excess)
    grid = 30 + math.isqrt(n)
    quartile = excess[int(n / 4 + 0.5) - 1]
    b = [
        1 / excess[-1] + (1 - math.sqrt(grid / (j - 0.5))) / (3 * quartile)
        for j in range(1, grid + 1)
    ]
    k = [sum(math.log1p(-bj * x) for x in excess) / n for bj in b]
    likelihood = [n * (math.log(-bj / kj) - kj - 1) for bj, kj in zip(b, k, strict=True)]
    weight = [1 / sum(math.exp(other - each) for other in likelihood) for each in likelihood]
    mean = sum(w * bj for w, bj in zip(weight, b, strict=True))
    return sum(math.log1p(-mean * x) for x in excess) / n


@pytest.mark.parametrize("n", [25, 100, 224, 225, 2000])
def test_pareto_k_is_the_published_fit(n: int) -> None:
    sample = np.sort(np.random.default_rng(n).lognormal(0.0, 1.5, n))
    tail = int(min(n / 5, 3 * math.sqrt(n)))
    excess = (sample[-tail:] - sample[-tail - 1]).tolist()
    expected = (tail * zhang_stephens(excess) + 10 * 0.5) / (tail + 10)
    assert pareto_k(torch.from_numpy(sample)) == pytest.approx(expected, rel=1e-9)


def test_pareto_k_over_forty_orders_of_magnitude() -> None:
    """Weights with a gradient, in float32, whose tail begins near 0."""
    x = torch.linspace(-95.0, 0.0, 100).exp().requires_grad_()
    excess = (x.detach().double()[-20:] - x.detach().double()[-21]).tolist()
    weight = torch.cat([torch.zeros(79), x.detach()[-21:]]).requires_grad_()
    expected = (20 * zhang_stephens(excess) + 10 * 0.5) / 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pareto_k(weight) == pytest.approx(expected, rel=1e-12)
    wide = torch.cat([torch.zeros(80), torch.linspace(-90.0, 0.0, 20).exp()]).double()
    expected = (20 * zhang_stephens(wide[80:].tolist()) + 10 * 0.5) / 30
    assert pareto_k(wide) == pytest.approx(expected, rel=1e-9)


def test_pareto_k_is_nan_where_there_is_no_tail() -> None:
    assert math.isnan(pareto_k(torch.rand(24)))
    assert not math.isnan(pareto_k(torch.rand(25, generator=torch.Generator().manual_seed(0))))
    assert math.isnan(pareto_k(torch.ones(1000)))
    assert math.isnan(pareto_k(torch.full((1000,), 1e6)))
    noise = 1 + 1e-7 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert math.isnan(pareto_k(noise))
    # Of half of the weights, whose size is not that of the least.
    assert math.isnan(pareto_k(torch.cat([torch.zeros(1000), noise])))
    clipped = torch.rand(1000, generator=torch.Generator().manual_seed(0)).clamp(max=0.5)
    assert math.isnan(pareto_k(clipped))


@pytest.mark.parametrize("tied", [0, 20, 47, 90, 95])
def test_pareto_k_leaves_out_what_equals_the_cut(tied: int) -> None:
    """The tail of 1000 is 94 weights; the fit is that of those above the tied ones."""
    sample = np.sort(np.random.default_rng(0).lognormal(0.0, 1.5, 1000))
    sample[-95 : -95 + tied] = sample[-95]
    excess = (sample[sample > sample[-95]] - sample[-95]).tolist()
    actual = pareto_k(torch.from_numpy(sample))
    if len(excess) < 5:
        assert math.isnan(actual)
    else:
        expected = (len(excess) * zhang_stephens(excess) + 10 * 0.5) / (len(excess) + 10)
        assert actual == pytest.approx(expected, rel=1e-9)
        assert 0 < actual < 1.2
    in_float32 = pareto_k(torch.from_numpy(sample).float())
    assert in_float32 == pytest.approx(actual, rel=1e-3, nan_ok=True)


LOGS = st.lists(
    st.tuples(st.floats(-8, 8), st.floats(-8, 8), st.integers(0, 4)), min_size=1, max_size=20
)


@settings(max_examples=60)
@given(data=LOGS)
def test_bound_gap_against_brute_force(data: list[tuple[float, float, int]]) -> None:
    assume(any(m for _, _, m in data))
    p, q, m = (torch.tensor(column) for column in zip(*data, strict=True))
    out = bound_gap(p, q, m)
    scale = sum(c * math.exp(b) for _, b, c in zip(p, q.tolist(), m.tolist(), strict=True))
    value = sum(c * math.exp(a) for a, c in zip(p.tolist(), m.tolist(), strict=True)) / scale
    surrogate = (
        sum(
            c * math.exp(b) * (1 + a - b)
            for a, b, c in zip(p.tolist(), q.tolist(), m.tolist(), strict=True)
        )
        / scale
    )
    assert float(out["importance_sampled_return"]) == pytest.approx(value, rel=1e-9)
    assert float(out["surrogate"]) == pytest.approx(surrogate, rel=1e-9, abs=1e-9)
    assert float(out["bound_gap"]) == pytest.approx(value - surrogate, rel=1e-9, abs=1e-9 * value)
    assert float(out["bound_gap"]) >= -1e-12 * value
    same = bound_gap(q, q, m)
    assert float(same["bound_gap"]) == 0.0
    assert float(same["surrogate"]) == pytest.approx(1.0)


def test_bound_gap_stays_finite_far_out() -> None:
    p, q = torch.tensor([900.0, 0.0]), torch.tensor([899.0, -torch.inf])
    out = bound_gap(p, q, torch.ones(2))
    # J / S's scale: e^1 against 1 + 1.
    assert float(out["bound_gap"]) == pytest.approx(math.e - 2.0)
    more = bound_gap(*(torch.cat([x, torch.tensor([1e4])]) for x in (p, q)), torch.arange(3) < 2)
    assert more == out


def trajectories(sizes: list[int], policy: GaussianPolicy) -> Any:
    generator = torch.Generator().manual_seed(0)
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    n = len(ids)
    batch = from_steps(
        {
            "observation": torch.randn(n, 3, generator=generator),
            "action": 2 * torch.rand(n, 2, generator=generator) - 1,
        },
        ids,
    )
    batch["ref_log_prob"] = policy.log_prob(batch.copy()).detach()
    batch["multiplicity"] = torch.randint(1, 4, (len(sizes),), generator=generator)[ids]
    batch["standard_score"] = torch.randint(-2, 3, (len(sizes),), generator=generator)[ids].float()
    batch["data_weight"] = torch.rand(n, generator=generator)
    return batch


def policy_of(seed: int) -> GaussianPolicy:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GaussianPolicy(3, 2, hidden=(8,))


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("proposal", ["lagged", "current", "reference"])
def test_diagnose_against_the_loss(layout: str, proposal: Any) -> None:
    sizes = [1 + i % 5 for i in range(40)]
    batch = trajectories(sizes, policy_of(1))
    first = torch.tensor([0, *np.cumsum(sizes)[:-1]])
    m = batch["multiplicity"][first].double()
    policy = policy_of(0)
    chain = ImportanceWeights(step=[weights.Temperature(2.0)], reduce="mean")
    loss = ImportanceWeightedMLE(policy, proposal=proposal, importance_weights=chain)
    if proposal == "lagged":
        EMA(loss, decay=0.5)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.3)
    given_batch = batch if layout == "packed" else pad(batch)
    out = diagnose(loss, given_batch)
    rho = (policy.log_prob(batch.copy()).detach() - batch["ref_log_prob"]).double()
    log_p = 2 * torch.stack([part.mean() for part in rho.split(sizes)])
    log_weight = loss.terms(batch).log_weight[first].double()
    repeated = np.repeat(log_weight.exp().numpy(), m.long().numpy())
    for p in QUANTILES:
        truth = np.quantile(repeated, p, method="inverted_cdf")
        assert out[f"weight_q{round(100 * p):02d}"] == pytest.approx(truth, rel=1e-5)
    j = float(m @ log_p.exp() / (m @ log_weight.exp()))
    s = float((m * log_weight.exp()) @ (1 + log_p - log_weight) / (m @ log_weight.exp()))
    assert out["importance_sampled_return"] == pytest.approx(j, rel=1e-5)
    assert out["surrogate"] == pytest.approx(s, rel=1e-5)
    assert out["bound_gap"] == pytest.approx(j - s, rel=1e-3, abs=1e-6)
    if proposal == "current":
        assert out["bound_gap"] == 0
    else:
        assert out["bound_gap"] > 0
    if proposal == "reference":
        assert "pareto_k" not in out and out["weight_q05"] == out["weight_q95"] == 1
        assert "weight_score_corr" not in out and out["weight_top1"] == pytest.approx(
            1 / float(m.sum())
        )
    else:
        assert out["pareto_k"] == pytest.approx(pareto_k(log_weight.exp()), rel=1e-4)
        heaviest = np.sort(repeated)[::-1][: math.ceil(len(repeated) / 100)].sum()
        assert out["weight_top1"] == pytest.approx(heaviest / repeated.sum(), rel=1e-5)
        of = {"length": torch.tensor(sizes), "score": batch["standard_score"][first]}
        for name, values in of.items():
            truth = stats.spearmanr(repeated, np.repeat(values, m.long())).statistic
            assert out[f"weight_{name}_corr"] == pytest.approx(truth, abs=1e-9)
    plain = ImportanceWeightedMLE(policy, proposal="reference")(given_batch)["loss_iw_mle"]
    assert out["unweighted_loss"] == pytest.approx(float(plain.detach()), rel=1e-6)
    assert all(isinstance(value, float) for value in out.values())


@pytest.mark.parametrize("reduce", ["mean", None])
def test_diagnose_does_not_see_multiplicity_zero(reduce: Any) -> None:
    sizes = [1 + i % 5 for i in range(60)]
    batch = trajectories(sizes, policy_of(1))
    uncounted = batch["collector", "traj_ids"] % 3 == 1
    batch["multiplicity"][uncounted] = 0
    batch["ref_log_prob"][uncounted] -= 300
    chain = ImportanceWeights(reduce=reduce)
    loss = ImportanceWeightedMLE(policy_of(0), proposal="current", importance_weights=chain)
    counted = batch[~uncounted]
    assert diagnose(loss, batch) == pytest.approx(diagnose(loss, counted), rel=1e-5, abs=1e-7)


def test_diagnose_the_per_step_variant_and_batches_without_reference() -> None:
    sizes = [3] * 20
    batch = trajectories(sizes, policy_of(1))
    loss = ImportanceWeightedMLE(
        policy_of(0), proposal="current", importance_weights=ImportanceWeights(reduce=None)
    )
    out = diagnose(loss, batch)
    rho = loss.log_prob(batch).detach() - batch["ref_log_prob"]
    assert out["pareto_k"] == pytest.approx(pareto_k(rho.exp()), rel=1e-4)
    of_trajectory = rho.exp().reshape(20, 3).mean(1).repeat_interleave(batch["multiplicity"][::3])
    score = batch["standard_score"][::3].repeat_interleave(batch["multiplicity"][::3])
    truth = stats.spearmanr(of_trajectory, score).statistic
    assert out["weight_score_corr"] == pytest.approx(truth, abs=1e-9)
    assert "weight_length_corr" not in out
    bare = diagnose(
        ImportanceWeightedMLE(policy_of(0), proposal="reference"), batch.exclude("ref_log_prob")
    )
    names = {f"weight_q{round(100 * p):02d}" for p in QUANTILES}
    assert set(bare) == names | {"unweighted_loss", "weight_top1"}


def test_diagnose_steps_of_wrong_answers_which_have_weights_of_their_own() -> None:
    batch = trajectories([3] * 20, policy_of(1))
    wrong = batch["collector", "traj_ids"] % 2 == 0
    batch["data_weight"] = torch.where(wrong, -1.0, 1.0)
    batch["success_rate"] = torch.full([60], 0.5)
    chain = ImportanceWeights.nft()
    loss = ImportanceWeightedMLE(policy_of(0), proposal="current", importance_weights=chain)
    r = (loss.log_prob(batch).detach() - batch["ref_log_prob"]).exp()
    weight = torch.where(wrong, 0.5 * r / (1 - 0.5 * r).clamp(min=0.5), 1.0)
    out, draws = diagnose(loss, batch), batch["multiplicity"][::3]
    assert out["pareto_k"] == pytest.approx(pareto_k(weight), rel=1e-4)
    columns = (weight.reshape(20, 3).mean(1), batch["standard_score"][::3])
    truth = stats.spearmanr(*(column.repeat_interleave(draws) for column in columns)).statistic
    assert out["weight_score_corr"] == pytest.approx(truth, abs=1e-9)


def test_diagnose_builds_no_graph() -> None:
    class Watched(GaussianPolicy):
        def log_prob(self, batch: Any) -> Any:
            assert not torch.is_grad_enabled()
            return super().log_prob(batch)

    policy = Watched(3, 2, hidden=(8,))
    diagnose(ImportanceWeightedMLE(policy, proposal="current"), trajectories([2], policy_of(1)))


def test_ess_counts_like_repetition() -> None:
    log_w = torch.tensor([0.3, -1.0, 2.0])
    repeated = torch.tensor([0.3, 0.3, -1.0, 2.0, 2.0, 2.0]).double().exp()
    truth = repeated.sum() ** 2 / (6 * (repeated**2).sum())
    assert float(log_ess(log_w, torch.tensor([2, 1, 3])).exp()) == pytest.approx(float(truth))


def test_weighted_mean_is_that_of_repeated_samples() -> None:
    value = torch.tensor([1.0, 5.0, 2.0])
    repeated = [1.0, 5.0, 5.0, 5.0, 2.0, 2.0]
    weight = {1.0: 0.5, 5.0: 2.0, 2.0: 1.0}
    truth = sum(weight[v] * v for v in repeated) / sum(weight[v] for v in repeated)
    ours = weighted_mean(value, torch.tensor([0.5, 2.0, 1.0]), torch.tensor([1, 3, 2]))
    assert float(ours) == pytest.approx(truth, rel=1e-12)
    assert ours.dtype == torch.float64
