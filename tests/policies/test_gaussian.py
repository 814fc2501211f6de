"""The Gaussian policy against scipy and torch.distributions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution
from torchrl.envs.utils import ExplorationType, set_exploration_type

from iwsft import EMA, GaussianPolicy, ImportanceWeightedMLE
from iwsft.policies.mixture import MixturePolicy
from iwsft.trajectory import TRAJ_IDS

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "squashed": {"squash": True},
    "state-dependent": {"state_dependent_std": True},
    "both": {"squash": True, "state_dependent_std": True},
}


def policy_of(**settings: Any) -> GaussianPolicy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        defaults: dict[str, Any] = {"hidden": (16, 16), "log_std_init": -0.4}
        policy = GaussianPolicy(5, 3, **defaults | settings)
        for name, parameter in policy.named_parameters():
            if name.endswith("log_std"):
                nn.init.normal_(parameter, -0.5, 0.3)
    return policy


def steps(*shape: int) -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    return TensorDict(
        {
            "observation": torch.randn(*shape, 5, generator=generator),
            "action": 1.8 * torch.rand(*shape, 3, generator=generator) - 0.9,
        },
        shape,
    )


def by_hand(policy: GaussianPolicy, observation: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """Mean and std in float64, from the parameters, layer by layer."""
    state = {
        name.split("module.")[-1]: p.detach().double() for name, p in policy.named_parameters()
    }
    layers = sorted({int(name.split(".")[1]) for name in state if name.startswith("net.")})
    x = observation.double()
    for layer in layers:
        x = x @ state[f"net.{layer}.weight"].T + state[f"net.{layer}.bias"]
        x = x.clamp(min=0) if layer != layers[-1] else x
    if settings.get("state_dependent_std"):
        x, log_std = x[..., :3], x[..., 3:] - 0.4
    else:
        log_std = state["log_std"].expand_as(x)
    return (x if settings.get("squash") else x.tanh()), log_std.clamp(-5, 2).exp()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(7,), (2, 4)])
def test_log_prob(variant: str, shape: tuple[int, ...]) -> None:
    settings = VARIANTS[variant]
    policy, batch = policy_of(**settings), steps(*shape)
    mean, std = by_hand(policy, batch["observation"], **settings)
    action = batch["action"].double()
    if settings.get("squash"):
        truth = TransformedDistribution(Independent(Normal(mean, std), 1), TanhTransform())
        expected = truth.log_prob(action).numpy()
        pre = np.arctanh(action.numpy())
        by_scipy = stats.norm.logpdf(pre, mean.numpy(), std.numpy()) - np.log(1 - np.tanh(pre) ** 2)
        np.testing.assert_allclose(by_scipy.sum(-1), expected, rtol=1e-6)
    else:
        expected = stats.norm.logpdf(action.numpy(), mean.numpy(), std.numpy()).sum(-1)
    ours = policy.log_prob(batch.copy())
    assert ours.shape == shape and ours.dtype == torch.float32
    np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_deterministic_action_is_the_mean(variant: str) -> None:
    settings = VARIANTS[variant]
    policy, batch = policy_of(**settings), steps(6)
    mean, _ = by_hand(policy, batch["observation"], **settings)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        out = policy(batch.select("observation"))
    expected = mean.tanh() if settings.get("squash") else mean
    torch.testing.assert_close(out["action"].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_follow_the_density(variant: str) -> None:
    settings = VARIANTS[variant]
    policy = policy_of(**settings)
    observation = steps(1)["observation"].expand(20_000, 5)
    mean, std = by_hand(policy, observation[:1], **settings)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        action = policy(TensorDict({"observation": observation}, [20_000]))["action"]
    if settings.get("squash"):
        assert bool((action.abs() <= 1).all())
        action = action.double().clamp(-1 + 1e-7, 1 - 1e-7).atanh()
    for d in range(3):
        test = stats.kstest(action[:, d].numpy(), "norm", (float(mean[0, d]), float(std[0, d])))
        assert test.pvalue > 1e-4


def test_the_default_is_the_network_of_the_paper() -> None:
    policy = GaussianPolicy(11, 3)
    shapes = [tuple(p.shape) for n, p in policy.named_parameters() if n.endswith("weight")]
    assert shapes == [(256, 11), (256, 256), (256, 256), (3, 256)]
    assert sum(isinstance(m, nn.ReLU) for m in policy.modules()) == 3
    (log_std,) = [p for n, p in policy.named_parameters() if n.endswith("log_std")]
    assert log_std.shape == (3,) and bool((log_std == 0).all())


@pytest.mark.parametrize(("value", "clamped"), [(-50.0, -5.0), (50.0, 2.0), (1.5, 1.5)])
def test_log_std_is_clamped(value: float, clamped: float) -> None:
    policy, batch = policy_of(), steps(4)
    for name, parameter in policy.named_parameters():
        if name.endswith("log_std"):
            nn.init.constant_(parameter, value)
    with torch.no_grad():
        scale = policy.get_dist(batch.copy()).base_dist.scale
    torch.testing.assert_close(scale, torch.full((4, 3), math.exp(clamped)))
    assert bool(policy.log_prob(batch.copy()).isfinite().all())


def test_actions_at_the_bounds_have_a_density() -> None:
    batch = steps(4)
    batch["action"] = torch.ones(4, 3)
    assert bool(policy_of().log_prob(batch.copy()).isfinite().all())


def test_other_keys() -> None:
    policy = policy_of(in_key=("state", "x"), out_key=("control", "u"))
    batch = steps(4)
    named = TensorDict(
        {("state", "x"): batch["observation"], ("control", "u"): batch["action"]}, [4]
    )
    assert torch.equal(policy.log_prob(named), policy_of().log_prob(batch.copy()))


def test_reset_restores_the_log_std() -> None:
    policy = policy_of()
    old = {name: p.clone() for name, p in policy.named_parameters()}
    policy.reset_parameters_recursive()
    for name, parameter in policy.named_parameters():
        assert not torch.equal(parameter, old[name])
        if name.endswith("log_std"):
            torch.testing.assert_close(parameter.data, torch.full((3,), -0.4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log_std_init": 3.0}, "log_std_init=3.0"),
        ({"log_std_bounds": (1.0, -1.0)}, "log_std_bounds"),
        ({"log_std_bounds": (-math.inf, 2.0)}, "log_std_bounds"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianPolicy(3, 2, **settings)


@pytest.mark.parametrize("steps_of_batch", [1025, 2500])
def test_a_long_batch_is_its_steps(steps_of_batch: int) -> None:
    """To the bit in the log-probs, although a long batch runs in parts."""
    policy, batch = policy_of(), steps(steps_of_batch)
    whole = policy.log_prob(batch.copy())
    parts = batch.split([3, 1020, steps_of_batch - 1023])
    assert torch.equal(torch.cat([policy.log_prob(part.copy()) for part in parts]), whole)
    ours = torch.autograd.grad(whole.sum(), list(policy.parameters()))
    double = policy_of().double()
    truth = double.log_prob(batch.double()).sum()
    for gradient, exact in zip(
        ours, torch.autograd.grad(truth, list(double.parameters())), strict=True
    ):
        assert float((gradient - exact).norm() / exact.norm()) < 1e-5


def test_log_prob_is_that_of_the_distribution() -> None:
    for settings in VARIANTS.values():
        policy, batch = policy_of(**settings), steps(2, 4)
        truth = policy.get_dist(batch.copy()).log_prob(batch["action"])
        torch.testing.assert_close(policy.log_prob(batch.copy()), truth)


@pytest.mark.parametrize(
    "policy",
    [GaussianPolicy(2, 1), GaussianPolicy(2, 1, squash=True), MixturePolicy(2, 1)],
    ids=["plain", "squashed", "mixture"],
)
def test_actions_of_another_size_are_refused(policy: GaussianPolicy | MixturePolicy) -> None:
    """Their density would be that of one number, repeated."""
    batch = TensorDict({"observation": torch.zeros(4, 2), "action": torch.zeros(4, 3)}, [4])
    with pytest.raises(ValueError, match=r"'action' has shape \[4, 3\], but the policy has size 1"):
        policy.log_prob(batch)
    other = TensorDict({"observation": torch.zeros(4, 3), "action": torch.zeros(4, 1)}, [4])
    with pytest.raises(ValueError, match=r"'observation' has shape \[4, 3\], .* size 2"):
        policy.log_prob(other)
    switch = batch.copy().set("action", torch.zeros(4, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"'action' is torch.bool, .*\.to\(torch.float32\)"):
        policy.log_prob(switch)


@pytest.mark.parametrize("make", [GaussianPolicy, MixturePolicy])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_observations_of_another_dtype_are_refused_with_the_way_out(
    make: type, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    policy, x = make(2, 1), torch.randint(-3, 3, (4, 2))
    batch = TensorDict({"observation": x.float(), "action": torch.zeros(4, 1)}, [4])
    right = policy.log_prob(batch.copy())
    other = batch.copy().set("observation", x.to(dtype))
    with pytest.raises(ValueError, match=rf"'observation' is {dtype}, .*\.to\(torch.float32\)"):
        policy.log_prob(other)
    other["observation"] = other["observation"].to(torch.float32)
    torch.testing.assert_close(policy.log_prob(other), right)
    loss = ImportanceWeightedMLE(policy, proposal="lagged")
    EMA(loss, decay=0.9)
    batch = batch.set("ref_log_prob", right.detach()).set(TRAJ_IDS, torch.zeros(4).long())
    torch.testing.assert_close(loss(batch)["loss_iw_mle"], -right.mean())
    with torch.autocast("cpu", torch.bfloat16):
        assert policy.log_prob(batch.copy().set("observation", x.bfloat16())).isfinite().all()


@pytest.mark.parametrize("sizes", [("3", 2), (3.0, 2), (0, 2), (3, 0)])
@pytest.mark.parametrize("make", [GaussianPolicy, MixturePolicy])
def test_sizes_are_whole_numbers(make: type, sizes: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"(observation|action)_dim=.* whole number from 1 on"):
        make(*sizes)
