"""Each transform and preset against its closed form."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from iwsft import ImportanceWeights, weights
from iwsft.lower_bound import LowerBound
from iwsft.trajectory import Segments, from_steps
from iwsft.weights import exponential, log_ess, log_mean_exp

FINITE = st.floats(-5, 5, width=32)


def segments_of(sizes: list[int]) -> Segments:
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return Segments.of(from_steps({"x": torch.zeros(len(ids))}, ids))


def weigh(chain: ImportanceWeights, log_ratio: Tensor, sizes: list[int]) -> Tensor:
    """Weight of each trajectory (its first step's), all drawn once."""
    segments = segments_of(sizes)
    count = 1 / segments.spread(segments.lengths)
    log_weight = chain(log_ratio, segments, count).log_weight
    assert all(len(part.unique()) == 1 for part in log_weight.split(sizes))
    return torch.stack([part[0] for part in log_weight.split(sizes)]).exp()


@settings(max_examples=30)
@given(x=st.lists(FINITE, min_size=1, max_size=20))
def test_step_transforms(x: list[float]) -> None:
    tensor, array = torch.tensor(x), np.array(x)
    cases: list[tuple[Callable[[Tensor], Tensor], np.ndarray]] = [
        (weights.Temperature(2.5), 2.5 * array),
        (weights.Temperature(0.0), 0 * array),
        (weights.Scale(0.1), 0.1 * array),
        (weights.ClipLogRatio(0.2, 1.8), np.minimum(np.maximum(array, 0.2), 1.8)),
        (weights.ClipLogRatio(max=1.0), np.minimum(array, 1.0)),
        (weights.ClipRatio(0.2, 1.8), np.log(np.clip(np.exp(array), 0.2, 1.8))),
        (weights.ClipRatio(max=2.0), np.log(np.minimum(np.exp(array), 2.0))),
    ]
    for transform, truth in cases:
        np.testing.assert_allclose(transform(tensor).numpy(), truth, rtol=1e-6, atol=1e-6)


@settings(max_examples=30)
@given(pairs=st.lists(st.tuples(FINITE, st.integers(0, 4)), min_size=1, max_size=20))
def test_trajectory_transforms(pairs: list[tuple[float, int]]) -> None:
    x, m = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    m[0] += 1  # The batch has a trajectory.
    log_w, count = torch.tensor(x, dtype=torch.float32), torch.tensor(m)
    w = np.exp(x)
    cases: list[tuple[Any, np.ndarray]] = [
        (weights.TemperWeight(0.3), w**0.3),
        (weights.ClipWeight(0.5, 2.0), np.clip(w, 0.5, 2.0)),
        (weights.ClipWeight(max=16.0), np.minimum(w, 16.0)),
        (weights.SelfNormalize(), w / (m @ w / m.sum())),
    ]
    for transform, truth in cases:
        np.testing.assert_allclose(transform(log_w, count).exp().numpy(), truth, rtol=2e-5)
    normalised = weights.SelfNormalize()(log_w, count).double().exp().numpy()
    assert m @ normalised / m.sum() == pytest.approx(1, rel=1e-5)
    assert float(log_mean_exp(log_w, count).exp()) == pytest.approx(m @ w / m.sum(), rel=1e-5)
    ess = (m @ w) ** 2 / (m.sum() * (m @ w**2))
    assert float(log_ess(log_w, count).exp()) == pytest.approx(ess, rel=1e-5)


@settings(max_examples=40)
@given(
    data=st.lists(st.tuples(st.integers(-500, 500), st.integers(1, 5)), min_size=2, max_size=40),
    fraction=st.floats(0.05, 0.99),
)
def test_target_ess_reaches_its_target(data: list[tuple[int, int]], fraction: float) -> None:
    x, m = (torch.tensor(column) for column in zip(*data, strict=True))
    x, m = x / 100, m.double()
    # The largest exponent leaves the share of the draws that hold the largest weight.
    least = float(log_ess(1000.0 * x.double(), m).exp())
    assume(abs(least - fraction) > 1e-3)
    out = weights.TargetESS(fraction)(x, m)
    reached = float(log_ess(out.double(), m).exp())
    if least > fraction:
        top = 1000.0 * x.double() - 1000.0 * float(x.max())
        torch.testing.assert_close(out.double() - float(out.max()), top, rtol=1e-5, atol=1e-3)
    else:
        assert reached == pytest.approx(fraction, abs=1e-4)
    assert float(log_mean_exp(out, m)) == pytest.approx(0, abs=1e-5)
    # A power of the weights: order and equality stay.
    assert torch.equal(out.argsort(stable=True), x.argsort(stable=True))


@pytest.mark.parametrize("n", [2, 10, 500])
def test_target_ess_on_a_thousand_log_normals(n: int) -> None:
    x = 3 * torch.randn(n, generator=torch.Generator().manual_seed(n))
    for fraction in (0.6, 0.8, 0.95, 1.0):
        out = weights.TargetESS(fraction)(x, torch.ones(n))
        assert float(log_ess(out, torch.ones(n)).exp()) == pytest.approx(fraction, abs=1e-4)


@pytest.mark.parametrize("factor", [-80.0, -0.1, 0.0, 0.1, 0.7, 80.0])
def test_target_ess_does_not_see_a_common_factor(factor: float) -> None:
    """Equal weights and a lone one are 1, also up to rounding; others keep their ratios."""
    draws = torch.tensor([1.0, 3.0, 2.0])
    noise = 1e-7 * torch.randn(3, generator=torch.Generator().manual_seed(0))
    for x in (torch.zeros(3), torch.zeros(3)[:1], noise):
        out = weights.TargetESS(0.4)(factor + x, draws[: len(x)]).exp()
        # The noise of a sum near 80 is that of its last bit, 4e-6.
        torch.testing.assert_close(out, torch.ones_like(x), rtol=0, atol=1e-3 + 0.02 * abs(factor))
    half = torch.tensor([0.0, -0.002, -0.004], dtype=torch.float64)
    for x in (half, torch.tensor([0.0, -3.0, 5.0], dtype=torch.float64), half * 1e4):
        out = weights.TargetESS(0.6)(factor + x, draws)
        torch.testing.assert_close(out, weights.TargetESS(0.6)(x, draws), rtol=1e-5, atol=1e-5)
        assert float(log_ess(out, draws).exp()) == pytest.approx(0.6, abs=1e-4)


def test_target_ess_ignores_what_does_not_count() -> None:
    """Neither the larger nor the smaller, nor an equal one, changes the weights that count."""
    x, draws = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 1.0])
    alone = weights.TargetESS(0.6)(x, draws)
    for uncounted in (80.0, 2.0, 0.0, -80.0, math.inf, math.nan):
        more = torch.cat([x, torch.tensor([uncounted])]), torch.cat([draws, torch.zeros(1)])
        out = weights.TargetESS(0.6)(*more)
        torch.testing.assert_close(out[:3], alone, rtol=0, atol=0)
        assert bool(out.isfinite().all())


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.9])
def test_target_ess_computes_in_float64(fraction: float) -> None:
    """On numbers that float32 holds exactly, both dtypes give the same up to the last rounding."""
    x = torch.tensor([0.0, 1.25, -3.5, 2.0, 0.75])
    draws, transform = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0]), weights.TargetESS(fraction)
    wide = transform(x.double(), draws)
    assert torch.equal(transform(x, draws), wide.float())
    assert torch.equal(transform(x.double() + 2.0**40, draws), wide)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_reduction_and_order_of_the_chain(reduce: Any) -> None:
    sizes = [3, 1, 4]
    x = torch.linspace(-1.0, 2.0, 8)
    chain = ImportanceWeights(
        # The last clip never bites, and must not hide the one before it.
        step=[
            weights.Temperature(2.0),
            weights.ClipLogRatio(-1.0, 3.0),
            weights.ClipRatio(max=1e6),
        ],
        reduce=reduce,
        trajectory=[weights.ClipWeight(max=5.0), weights.TemperWeight(0.5)],
    )
    rho = [np.clip(2 * part.double().numpy(), -1, 3) for part in x.split(sizes)]
    truth = [min(math.exp(r.sum() if reduce == "sum" else r.mean()), 5.0) ** 0.5 for r in rho]
    np.testing.assert_allclose(weigh(chain, x, sizes).numpy(), truth, rtol=1e-6)
    segments = segments_of(sizes)
    clipped = chain(x, segments, 1 / segments.spread(segments.lengths)).clipped
    step_clipped = [abs(2 * v) > 0 and not -1 <= 2 * v <= 3 for v in x.tolist()]
    too_large = [(r.sum() if reduce == "sum" else r.mean()) > math.log(5.0) for r in rho]
    late = torch.repeat_interleave(torch.tensor(too_large), torch.tensor(sizes))
    assert torch.equal(clipped, torch.tensor(step_clipped) | late)


def test_per_step_variant_weighs_each_step() -> None:
    segments = segments_of([3, 2])
    x = torch.tensor([-3.0, 0.0, 3.0, 0.1, -0.1])
    chain = ImportanceWeights(step=[weights.ClipRatio(0.2, 1.8)], reduce=None)
    log_weight, clipped, _ = chain(x, segments, torch.ones(5))
    np.testing.assert_allclose(
        log_weight.exp().numpy(), [0.2, 1.0, 1.8, math.exp(0.1), math.exp(-0.1)], rtol=1e-6
    )
    assert clipped.tolist() == [True, False, True, False, False]


PRESETS: dict[str, tuple[ImportanceWeights, Callable[[np.ndarray], float]]] = {
    "paper_control": (
        ImportanceWeights.paper_control(0.8),
        lambda x: math.exp(0.8 * x.sum() / len(x)),
    ),
    "paper_llm": (
        ImportanceWeights.paper_llm(),
        lambda x: math.exp(sum(0.1 * min(max(v, 0.2), 1.8) for v in x)),
    ),
    "authors_control": (
        ImportanceWeights.authors_control(10.0, normalize=False),
        lambda x: min(max(math.exp(10.0 * x.sum() / len(x)), 0.0), 1000.0),
    ),
    "authors_llm": (
        ImportanceWeights.authors_llm(),
        lambda x: min(math.exp(x.mean()), 16.0),
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_follow_their_formulas(name: str) -> None:
    chain, formula = PRESETS[name]
    sizes = [4, 1, 7, 2] * 2
    x = torch.randn(14, generator=torch.Generator().manual_seed(3)) * 4
    # Ratios below 1 as well as above it.
    x = torch.cat([x, -x])
    truth = [formula(part.double().numpy()) for part in x.split(sizes)]
    np.testing.assert_allclose(weigh(chain, x, sizes).numpy(), truth, rtol=1e-5)


def test_the_authors_language_model_code_clips_at_16() -> None:
    chain = ImportanceWeights.authors_llm()
    actual = weigh(chain, torch.tensor([15.9, 16.9]).log(), [1, 1])
    torch.testing.assert_close(actual, torch.tensor([15.9, 16.0]))


def test_authors_normalisation_divides_by_the_mean_of_clipped_weights() -> None:
    sizes = [4, 1, 7, 2]
    x = torch.randn(14, generator=torch.Generator().manual_seed(3)) + 1
    raw = weigh(ImportanceWeights.authors_control(10.0, normalize=False), x, sizes)
    assert float(raw.max()) == pytest.approx(1000.0)
    normalised = weigh(ImportanceWeights.authors_control(10.0, normalize=True), x, sizes)
    torch.testing.assert_close(normalised, raw / raw.mean())


@pytest.mark.parametrize("name", ["paper_control", "authors_control", "authors_llm"])
def test_presets_with_g_of_zero_start_at_one(name: str) -> None:
    assert bool((weigh(PRESETS[name][0], torch.zeros(6), [4, 2]) == 1).all())


def test_literal_paper_g_overflows_beyond_4436_steps() -> None:
    chain = ImportanceWeights.paper_llm()
    # float32 ends at e^88.7228, and every step adds at least 0.02.
    assert 0.02 * 4436 < math.log(torch.finfo(torch.float32).max) < 0.02 * 4437
    for longest in (1, 4436):
        chain.check_overflow(longest)
    with pytest.raises(OverflowError, match="4437 steps.*ClipWeight"):
        chain.check_overflow(4437)
    low = torch.full((4437,), -1.0)
    assert bool(weigh(chain, low, [4437]).isinf())
    assert bool(weigh(chain, low[1:], [4436]).isfinite())


def test_the_overflow_check_weighs_one_trajectory() -> None:
    shares = []

    def look(log_weight: Tensor, share: Tensor) -> Tensor:
        shares.append(share)
        return log_weight

    ImportanceWeights(trajectory=[look]).check_overflow(3)
    torch.testing.assert_close(shares[0], torch.ones(1))


def test_chains_that_stay_finite_pass_the_overflow_check() -> None:
    g: list[Any] = [weights.ClipLogRatio(0.2, 1.8), weights.Scale(0.1)]
    for chain in (
        ImportanceWeights(step=g, reduce="mean"),
        ImportanceWeights(step=g, reduce="sum", trajectory=[weights.ClipWeight(max=1000.0)]),
        ImportanceWeights(step=g, reduce="sum", trajectory=[weights.TemperWeight(0.01)]),
        ImportanceWeights(step=g, reduce=None),
        ImportanceWeights(reduce="sum"),
        ImportanceWeights(step=[weights.Temperature(0.0)], reduce="sum"),
        ImportanceWeights.authors_control(10.0, normalize=True),
    ):
        chain.check_overflow(100_000)
    # Normalising a lone trajectory to 1 must not hide it.
    with pytest.raises(OverflowError):
        ImportanceWeights(
            step=g, reduce="sum", trajectory=[weights.SelfNormalize()]
        ).check_overflow(100_000)


@pytest.mark.parametrize(
    "build",
    [
        lambda: weights.Temperature(-1.0),
        lambda: weights.Scale(0.0),
        lambda: weights.ClipLogRatio(1.0, 0.0),
        lambda: weights.ClipRatio(-0.1, 1.0),
        lambda: weights.ClipRatio(2.0, 1.0),
        lambda: weights.TemperWeight(-1.0),
        lambda: weights.ClipWeight(3.0, 2.0),
        lambda: weights.ClipWeight(-1.0, 2.0),
        lambda: weights.TargetESS(0.0),
        lambda: weights.TargetESS(1.1),
        lambda: weights.TargetESS(0.5, max_alpha=0.0),
        lambda: weights.ClipLogRatio(math.inf, math.inf),
        lambda: weights.ClipRatio(max=0.0),
        lambda: weights.ClipWeight(min=math.inf),
        *(
            partial(transform, number)
            for transform in (
                weights.Temperature,
                weights.Scale,
                weights.TemperWeight,
                weights.TargetESS,
                partial(weights.TargetESS, 0.5),
            )
            for number in (math.inf, -math.inf, math.nan)
        ),
        partial(weights.ClipLogRatio, max=math.nan),
        partial(weights.ClipWeight, max=math.nan),
        lambda: ImportanceWeights(reduce="max"),  # type: ignore[arg-type]
        lambda: ImportanceWeights(reduce=None, trajectory=[LowerBound()]),
    ],
)
def test_wrong_settings_are_refused(build: Callable[[], Any]) -> None:
    with pytest.raises(ValueError):
        build()


def test_settings_at_the_limit_are_taken() -> None:
    assert weights.ClipLogRatio(1.0, 1.0)(torch.zeros(1)) == 1.0
    assert weights.TemperWeight(0.0)(torch.ones(1), torch.ones(1)) == 0.0
    half = weights.TargetESS(0.01, max_alpha=0.5)(torch.tensor([0.0, 2.0]), torch.ones(2))
    assert float(half[1] - half[0]) == pytest.approx(1.0)


def test_a_transform_in_the_wrong_place_is_named() -> None:
    with pytest.raises(ValueError, match=r"ClipWeight.*trajectory=\[...\]"):
        ImportanceWeights(step=[weights.ClipWeight(max=2.0)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"Temperature.*step=\[...\]"):
        ImportanceWeights(trajectory=[weights.Temperature(1.0)])  # type: ignore[list-item]


class _Halved:
    """A transform of the trajectory that clips: weights above 2 are halved."""

    place = "trajectory"
    clips = True

    def __call__(self, log_weight: Tensor, share: Tensor) -> Tensor:
        return torch.where(log_weight > math.log(2), log_weight - math.log(2), log_weight)


class _Centred:
    """A transform that compares."""

    compares = True

    def __call__(self, log_weight: Tensor, share: Tensor) -> Tensor:
        return log_weight - (share * log_weight).sum() / share.sum()


def test_a_transform_declares_what_it_is() -> None:
    segments, x = segments_of([2, 1]), torch.tensor([0.5, 1.5, 0.1])
    share = 1 / segments.spread(segments.lengths)
    log_weight, clipped, _ = ImportanceWeights(trajectory=[_Halved()])(x, segments, share)
    halved = 1 - math.log(2)
    np.testing.assert_allclose(log_weight.numpy(), [halved, halved, 0.1], rtol=1e-6)
    assert clipped.tolist() == [True, True, False]
    with pytest.raises(ValueError, match=r"_Halved.*belongs to trajectory=\[...\]"):
        ImportanceWeights(step=[_Halved()])  # type: ignore[list-item]
    # Plain functions declare nothing: they neither clip nor compare, and go where they are put.
    plain = ImportanceWeights(step=[torch.tanh], trajectory=[lambda x, share: x.clamp(max=0)])
    log_weight, clipped, _ = plain(x, segments, share)
    assert not plain.compares and not bool(clipped.any()) and bool((log_weight == 0).all())
    ours = (weights.SelfNormalize(), weights.TargetESS(0.5), LowerBound())
    assert all(ImportanceWeights(trajectory=[t]).compares for t in (_Centred(), *ours))
    assert not ImportanceWeights(trajectory=[_Halved(), weights.ClipWeight()]).compares
    # A comparison makes a lone trajectory's weight 1, which would hide its overflow.
    long = ImportanceWeights(step=[weights.ClipLogRatio(min=0.02)], reduce="sum")
    with pytest.raises(OverflowError):
        ImportanceWeights(long.step, "sum", [_Centred()]).check_overflow(5000)


@settings(max_examples=60)
@given(
    data=st.lists(
        st.tuples(st.floats(-60, 60, width=32), st.integers(1, 9)), min_size=1, max_size=30
    )
)
def test_ess_is_a_share(data: list[tuple[float, int]]) -> None:
    x, m = (torch.tensor(column) for column in zip(*data, strict=True))
    ess = float(log_ess(x, m.double()).exp().float())
    assert 0 < ess <= 1


def test_target_ess_does_not_see_what_is_not_counted() -> None:
    log_weight, share = torch.tensor([0.0, 1.0, 2.0, 5000.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    unknown = torch.cat([log_weight[:3], torch.tensor([math.nan])])
    assert log_mean_exp(unknown, share) == log_mean_exp(log_weight[:3], share[:3])
    for transform in (weights.TargetESS(0.5), weights.SelfNormalize()):
        counted = transform(log_weight[:3], share[:3].double())
        assert torch.equal(transform(log_weight, share.double())[:3], counted)


@pytest.mark.parametrize("log_weight", [89.0, torch.inf])
def test_weights_beyond_float32_are_refused(log_weight: float) -> None:
    with pytest.raises(OverflowError, match="overflow float32"):
        exponential(torch.tensor([0.0, log_weight]))
    with pytest.raises(FloatingPointError, match=r"NaN, first at \[1\]: .*validation.validate"):
        exponential(torch.tensor([log_weight, torch.nan]))
    assert exponential(torch.tensor([88.0, -torch.inf])).isfinite().all()


def test_compiled_overflow_is_an_assertion_of_the_device() -> None:
    assert exponential(torch.zeros(2, device="meta")).shape == (2,)
    compiled = torch.compile(exponential, backend="eager", fullgraph=True)
    assert bool((compiled(torch.zeros(2)) == 1).all())
    with pytest.raises(RuntimeError, match="importance weights overflow float32 or are NaN"):
        compiled(torch.full((2,), 89.0))
    torch._dynamo.reset()


@pytest.mark.gpu
def test_an_overflow_on_a_gpu_is_an_assertion_of_the_device() -> None:
    """In a process of its own, whose device can't be used after it."""
    lines = (
        "import torch, iwsft.weights",
        "iwsft.weights.exponential(torch.full((3,), 200.0, device='cuda'))",
        "torch.cuda.synchronize()",
    )
    done = subprocess.run([sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True)
    assert done.returncode != 0 and "importance weights overflow" in done.stderr + done.stdout
