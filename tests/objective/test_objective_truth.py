"""The loss against brute force: loops over trajectories in plain float64 numpy."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from tensordict import TensorDictBase

from iwsft import (
    EMA,
    GaussianPolicy,
    ImportanceWeightedMLE,
    ImportanceWeights,
    weights,
)
from iwsft.trajectory import MASK, MULTIPLICITY, TRAJ_IDS, from_steps, lengths, pad, select

Array = np.ndarray
# name -> our transform and the same on a list of log-ratios, or on log-weights and draws
STEP: dict[str, tuple[Any, Callable[[Array], Array]]] = {
    "temperature": (weights.Temperature(1.7), lambda x: 1.7 * x),
    "scale": (weights.Scale(0.4), lambda x: 0.4 * x),
    "clip-log": (weights.ClipLogRatio(-0.3, 0.5), lambda x: np.clip(x, -0.3, 0.5)),
    "clip-ratio": (weights.ClipRatio(0.2, 1.8), lambda x: np.log(np.clip(np.exp(x), 0.2, 1.8))),
}


def _ess(log_weight: Array, draws: Array) -> float:
    w = np.exp(log_weight)
    return float((draws @ w) ** 2 / (draws.sum() * (draws @ w**2)))


def _target_ess(log_weight: Array, draws: Array) -> Array:
    alpha = brentq(lambda a: _ess(a * log_weight, draws) - 0.8, 1e-6, 100.0, xtol=1e-12)
    return alpha * log_weight - np.log(draws @ np.exp(alpha * log_weight) / draws.sum())


TRAJECTORY: dict[str, tuple[Any, Callable[[Array, Array], Array]]] = {
    "temper": (weights.TemperWeight(0.6), lambda x, m: 0.6 * x),
    "clip": (weights.ClipWeight(0.7, 1.3), lambda x, m: np.log(np.clip(np.exp(x), 0.7, 1.3))),
    "normalise": (weights.SelfNormalize(), lambda x, m: x - np.log(m @ np.exp(x) / m.sum())),
    "target-ess": (weights.TargetESS(0.8), _target_ess),
}
CHAINS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((), ()),
    (("temperature",), ("clip",)),
    (("scale", "clip-log"), ("normalise",)),
    (("clip-ratio",), ("temper", "clip", "normalise")),
    ((), ("target-ess",)),
    (("temperature", "clip-log"), ("target-ess", "normalise")),
]


def log_normal(policy: GaussianPolicy, batch: TensorDictBase) -> Array:
    """log pi(a|s) of a Gaussian policy without hidden layers, written out."""
    state = {
        name.split(".")[-1]: p.detach().double().numpy() for name, p in policy.named_parameters()
    }
    x, a = batch["observation"].double().numpy(), batch["action"].double().numpy()
    mean = np.tanh(x @ state["weight"].T + state["bias"])
    log_std = np.clip(state["log_std"], -5, 2)
    z = (a - mean) / np.exp(log_std)
    return (-0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)


def brute_force_weights(
    log_q: Array, log_ref: Array, spans: list[slice], draws: Array, chain: Any, reduce: str | None
) -> list[Array]:
    """One array per trajectory: the weight at each of its steps."""
    step, trajectory = chain
    rho = []
    for span in spans:
        x = log_q[span] - log_ref[span]
        for name in step:
            x = STEP[name][1](x)
        rho.append(x)
    if reduce is None:
        # Each step is a sample of its own, and counts draws / length.
        log_w = np.concatenate(rho)
        m = np.concatenate([np.full(len(x), d / len(x)) for x, d in zip(rho, draws, strict=True)])
    else:
        log_w = np.array([x.sum() if reduce == "sum" else x.mean() for x in rho])
        m = draws
    for name in trajectory:
        log_w = TRAJECTORY[name][1](log_w, m)
    if reduce is None:
        return np.split(np.exp(log_w), np.cumsum([len(x) for x in rho])[:-1])
    return [np.full(len(x), np.exp(w)) for x, w in zip(rho, log_w, strict=True)]


def brute_force_loss(
    log_p: Array, w: list[Array], spans: list[slice], draws: Array, length_normalize: bool
) -> float:
    total = 0.0
    for j, span in enumerate(spans):
        term = sum(float(w[j][i]) * float(lp) for i, lp in enumerate(log_p[span]))
        total -= draws[j] * term / (len(w[j]) if length_normalize else 1)
    return total / draws.sum()


def spans_of(sizes: list[int]) -> list[slice]:
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def chain_of(names: Any, reduce: Any) -> ImportanceWeights:
    return ImportanceWeights(
        step=[STEP[n][0] for n in names[0]],
        reduce=reduce,
        trajectory=[TRAJECTORY[n][0] for n in names[1]],
    )


@pytest.fixture(scope="module")
def linear(make_policy: Any) -> Callable[..., GaussianPolicy]:
    return lambda seed, dtype=torch.float64: make_policy(seed, dtype, hidden=())


def lagged_pair(theta: GaussianPolicy, q: GaussianPolicy, **keywords: Any) -> ImportanceWeightedMLE:
    """A loss at theta whose q has other parameters."""
    loss = ImportanceWeightedMLE(theta, proposal="lagged", **keywords)
    EMA(loss, decay=0.9)
    state = {k: v.clone() for k, v in loss.state_dict().items()}
    other = ImportanceWeightedMLE(q, proposal="lagged")
    state |= {k: v for k, v in other.state_dict().items() if k.startswith("target_")}
    loss.load_state_dict(state)
    return loss


@pytest.mark.parametrize("names", CHAINS, ids=lambda c: "+".join((*c[0], *c[1])) or "plain")
@pytest.mark.parametrize("reduce", ["sum", "mean", None])
@pytest.mark.parametrize("length_normalize", [True, False])
@pytest.mark.parametrize("multiplicity", [True, False])
def test_loss_and_gradient_against_brute_force(
    make_batch: Any,
    linear: Any,
    names: Any,
    reduce: Any,
    length_normalize: bool,
    multiplicity: bool,
) -> None:
    sizes = [5, 1, 9, 3]
    spans = spans_of(sizes)
    batch = make_batch(sizes, dtype=torch.float64, multiplicity=multiplicity)
    draws = np.ones(4)
    if multiplicity:
        draws = np.array([batch["multiplicity"][s.start] for s in spans], dtype=float)
    theta, q, ref = linear(0), linear(1), linear(2)
    log_ref = log_normal(ref, batch)
    batch["ref_log_prob"] = torch.from_numpy(log_ref)
    log_q = log_normal(q, batch)
    w = brute_force_weights(log_q, log_ref, spans, draws, (names[0], names[1]), reduce)
    truth = brute_force_loss(log_normal(theta, batch), w, spans, draws, length_normalize)
    loss = lagged_pair(
        theta, q, importance_weights=chain_of(names, reduce), length_normalize=length_normalize
    )
    out = loss(batch)
    # TargetESS finds its exponent to a relative 1e-6.
    tolerance = 1e-5 if "target-ess" in names[1] else 1e-9
    assert out["loss_iw_mle"].item() == pytest.approx(truth, rel=tolerance)

    out["loss_iw_mle"].backward()
    step = 1e-5
    for parameter in loss.parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for i in range(len(flat)):
            ends = []
            for sign in (1, -1):
                flat[i] += sign * step
                log_p = log_normal(theta, batch)
                ends.append(brute_force_loss(log_p, w, spans, draws, length_normalize))
                flat[i] -= sign * step
            difference = (ends[0] - ends[1]) / (2 * step)
            assert gradient[i].item() == pytest.approx(difference, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("reduce", ["sum", "mean", None])
def test_diagnostics_against_brute_force(make_batch: Any, linear: Any, reduce: Any) -> None:
    sizes = [5, 1, 9, 3]
    spans = spans_of(sizes)
    batch = make_batch(sizes, dtype=torch.float64)
    draws = np.array([batch["multiplicity"][s.start] for s in spans], dtype=float)
    theta, q, ref = linear(0), linear(1), linear(2)
    log_p, log_q, log_ref = (log_normal(policy, batch) for policy in (theta, q, ref))
    batch["ref_log_prob"] = torch.from_numpy(log_ref)
    names = (("clip-log",), ("clip",))
    out = lagged_pair(theta, q, importance_weights=chain_of(names, reduce))(batch)
    w = brute_force_weights(log_q, log_ref, spans, draws, names, reduce)
    m = np.concatenate([np.full(n, d / n) for n, d in zip(sizes, draws, strict=True)])
    m /= m.sum()
    per_step = np.concatenate(w)
    assert float(out["weight_mean"]) == pytest.approx(m @ per_step, rel=1e-6)
    assert float(out["weight_max"]) == pytest.approx(per_step.max(), rel=1e-6)
    assert float(out["ESS"]) == pytest.approx((m @ per_step) ** 2 / (m @ per_step**2), rel=1e-6)
    assert float(out["log_prob"]) == pytest.approx(m @ log_p, rel=1e-6)
    assert float(out["kl_approx"]) == pytest.approx(m @ (log_ref - log_p), rel=1e-5)
    clipped = np.abs((log_q - log_ref) - np.clip(log_q - log_ref, -0.3, 0.5)) > 0
    bare = brute_force_weights(log_q, log_ref, spans, draws, (("clip-log",), ()), reduce)
    for span, before, after in zip(spans, bare, w, strict=True):
        clipped[span] |= np.abs(before - after) > 1e-12
    assert float(out["clip_fraction"]) == pytest.approx(m @ clipped, rel=1e-6)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    reduce=st.sampled_from(["sum", "mean", None]),
    length_normalize=st.booleans(),
    extra=st.integers(0, 3),
)
def test_packed_equals_padded_equals_brute_force(
    make_batch: Any,
    linear: Any,
    gradients: Any,
    sizes: list[int],
    reduce: Any,
    length_normalize: bool,
    extra: int,
) -> None:
    batch = make_batch(sizes, seed=sum(sizes), dtype=torch.float64)
    spans = spans_of(sizes)
    draws = np.array([batch["multiplicity"][s.start] for s in spans], dtype=float)
    names = (("clip-ratio",), ("clip", "normalise"))
    loss = lagged_pair(
        linear(0),
        linear(1),
        importance_weights=chain_of(names, reduce),
        length_normalize=length_normalize,
    )
    log_ref = batch["ref_log_prob"].numpy()
    w = brute_force_weights(log_normal(linear(1), batch), log_ref, spans, draws, names, reduce)
    truth = brute_force_loss(log_normal(linear(0), batch), w, spans, draws, length_normalize)
    padded = pad(batch, max(sizes) + extra)
    packed_out, padded_out = loss(batch), loss(padded)
    assert packed_out["loss_iw_mle"].item() == pytest.approx(truth, rel=1e-9)
    for key, value in packed_out.items():
        torch.testing.assert_close(value, padded_out[key], msg=key)
    padded_gradients = gradients(loss, padded)
    for name, gradient in gradients(loss, batch).items():
        torch.testing.assert_close(gradient, padded_gradients[name], msg=name)
    assert 0 < float(packed_out["ESS"]) <= 1


@pytest.mark.parametrize("reduce", ["sum", "mean", None])
def test_multiplicity_is_repetition(
    make_batch: Any, linear: Any, gradients: Any, reduce: Any
) -> None:
    batch = make_batch([4, 2, 7], dtype=torch.float64)
    draws = [3, 1, 2]
    ids = batch[TRAJ_IDS]
    batch[MULTIPLICITY] = torch.tensor(draws)[ids]
    loss = lagged_pair(
        linear(0), linear(1), importance_weights=chain_of(((), ("clip", "normalise")), reduce)
    )
    copies = [batch[ids == j].exclude(MULTIPLICITY) for j, m in enumerate(draws) for _ in range(m)]
    for j, copy in enumerate(copies):
        copy[TRAJ_IDS] = torch.full_like(copy[TRAJ_IDS], j)
    repeated = torch.cat(copies)
    a, b = loss(batch), loss(repeated)
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], msg=key)
    other = gradients(loss, repeated)
    for name, gradient in gradients(loss, batch).items():
        torch.testing.assert_close(gradient, other[name], msg=name)


def test_zero_multiplicity_is_absence(make_batch: Any, linear: Any) -> None:
    batch = make_batch([4, 2, 7], dtype=torch.float64)
    batch[MULTIPLICITY] = torch.tensor([2, 0, 1])[batch[TRAJ_IDS]]
    loss = lagged_pair(
        linear(0), linear(1), importance_weights=chain_of(((), ("normalise",)), "mean")
    )
    a, b = loss(batch), loss(select(batch, torch.tensor([0, 2])))
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], msg=key)


@settings(max_examples=15)
@given(
    order=st.permutations(range(5)),
    reduce=st.sampled_from(["sum", "mean", None]),
    layout=st.sampled_from(["packed", "padded"]),
)
def test_order_of_trajectories_does_not_matter(
    make_batch: Any, linear: Any, order: list[int], reduce: Any, layout: str
) -> None:
    batch = make_batch([4, 1, 7, 2, 3], dtype=torch.float64)
    ids = batch[TRAJ_IDS]
    if layout == "padded":
        batch = pad(batch)
        moved = batch[torch.tensor(order)]
    else:
        parts = [batch[ids == j].clone() for j in order]
        for new, part in enumerate(parts):
            part[TRAJ_IDS].fill_(10 * new)
        moved = torch.cat(parts)
    loss = lagged_pair(
        linear(0), linear(1), importance_weights=chain_of(((), ("normalise",)), reduce)
    )
    a, b = loss(batch), loss(moved)
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], msg=key)


def test_sft_is_the_mean_log_likelihood(make_batch: Any, linear: Any) -> None:
    batch = make_batch([5, 8, 12], dtype=torch.float64, multiplicity=False)
    out = ImportanceWeightedMLE(linear(0), proposal="reference")(batch)
    log_p = log_normal(linear(0), batch)
    expected = -np.mean([log_p[s].mean() for s in spans_of([5, 8, 12])])
    assert out["loss_iw_mle"].item() == pytest.approx(expected, rel=1e-12)


def test_long_trajectories_keep_float32_accuracy(make_policy: Any) -> None:
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    batch = from_steps(
        {
            "observation": torch.randn(n, 3, generator=generator),
            "action": 2 * torch.rand(n, 2, generator=generator) - 1,
        },
        torch.arange(n) // 10_000,
    )
    policy = make_policy()
    batch["ref_log_prob"] = make_policy(seed=3).log_prob(batch.copy()).detach()
    loss = ImportanceWeightedMLE(policy, proposal="current", length_normalize=False)
    log_p = policy.log_prob(batch.copy()).detach().double()
    rho = (log_p - batch["ref_log_prob"].double()).view(2, -1)
    truth = -(rho.mean(1).exp() * log_p.view(2, -1).sum(1)).mean()
    assert loss(batch)["loss_iw_mle"].item() == pytest.approx(float(truth), rel=3e-6)


def test_masked_steps_do_not_count(make_batch: Any, linear: Any) -> None:
    """A mask inside a packed batch equals dropping the steps."""
    batch = make_batch([6, 4, 7], dtype=torch.float64)
    keep = torch.ones(17, dtype=torch.bool)
    keep[[0, 3, 9, 16]] = False
    loss = lagged_pair(linear(0), linear(1))
    a, b = loss(batch.copy().set(MASK, keep)), loss(batch[keep])
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], msg=key)
    assert lengths(batch[keep]).tolist() == [4, 3, 6]
