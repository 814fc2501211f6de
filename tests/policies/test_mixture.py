"""The mixture of Gaussians against a density that is summed component by component."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from iwsft import GaussianPolicy, MixturePolicy, load_policy
from iwsft.policies.mixture import _MixtureHead
from iwsft.trained_policy import TrainedPolicy, save_policy

K, ACT = 3, 2


def policy_of(components: int = K) -> MixturePolicy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = MixturePolicy(5, ACT, components=components, hidden=(16,))
        nn.init.normal_(head_of(policy).log_std, -0.5, 0.3)
    return policy


def head_of(policy: MixturePolicy) -> _MixtureHead:
    (head,) = [module for module in policy.modules() if isinstance(module, _MixtureHead)]
    return head


def steps(*shape: int) -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    observation = torch.randn(*shape, 5, generator=generator)
    action = 2 * torch.rand(*shape, ACT, generator=generator) - 1
    return TensorDict({"observation": observation, "action": action}, shape)


def by_hand(policy: MixturePolicy, observation: Tensor) -> tuple[np.ndarray, ...]:
    """Weights ``[n, K]``, means ``[n, K, act]`` and stds ``[K, act]`` in float64."""
    (w1, b1, w2, b2) = (p.detach().double().numpy() for p in head_of(policy).net.parameters())
    out = np.maximum(observation.double().numpy() @ w1.T + b1, 0) @ w2.T + b2
    weight = np.exp(out[:, :K]) / np.exp(out[:, :K]).sum(1, keepdims=True)
    offset = head_of(policy).offset.detach().double().numpy()
    raw = [out[:, K + ACT * k : K + ACT * (k + 1)] + offset[k] for k in range(K)]
    means = np.tanh(np.stack(raw, 1))
    return weight, means, np.exp(np.clip(head_of(policy).log_std.detach().double().numpy(), -5, 2))


@pytest.mark.parametrize("log_std", [None, -50.0, 50.0])
def test_log_prob(log_std: float | None) -> None:
    policy, batch = policy_of(), steps(8)
    if log_std is not None:
        nn.init.constant_(head_of(policy).log_std, log_std)
    weight, means, std = by_hand(policy, batch["observation"])
    density = [
        np.log(weight[:, k]) + stats.norm.logpdf(batch["action"], means[:, k], std[k]).sum(1)
        for k in range(K)
    ]
    ours = policy.log_prob(batch.copy()).detach()
    np.testing.assert_allclose(ours, np.logaddexp.reduce(density), rtol=1e-3, atol=1e-4)
    assert torch.equal(policy.log_prob(batch.reshape(2, 4)).detach(), ours.reshape(2, 4))


def test_one_component_is_a_gaussian() -> None:
    policy, gaussian, batch = policy_of(1), GaussianPolicy(5, ACT, hidden=(16,)), steps(8)
    nn.init.zeros_(head_of(policy).offset)
    theirs = policy.state_dict()
    for name, value in gaussian.state_dict().items():
        # The first row of the last layer gives the logit.
        value.copy_(theirs[name].flatten()[-value.numel() :].reshape(value.shape))
    torch.testing.assert_close(policy.log_prob(batch.copy()), gaussian.log_prob(batch.copy()))


def test_the_action_without_noise_is_the_mean_of_the_heaviest_component() -> None:
    policy, batch = policy_of(), steps(50)
    weight, means, _ = by_hand(policy, batch["observation"])
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        action = policy(batch.select("observation"))["action"]
    best = weight.argmax(1)
    assert len(set(best)) > 1
    np.testing.assert_allclose(action, means[np.arange(50), best], rtol=1e-5, atol=1e-6)


def test_samples_follow_the_density() -> None:
    policy, observation = policy_of(), steps(1)["observation"].expand(20_000, 5)
    (weight,), (means,), std = by_hand(policy, observation[:1])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        action = policy(TensorDict({"observation": observation}, [20_000]))["action"].numpy()
    for d in range(ACT):

        def distribution(x: np.ndarray, d: int = d) -> np.ndarray:
            return sum(weight[k] * stats.norm.cdf(x, means[k, d], std[k, d]) for k in range(K))

        assert stats.kstest(action[:, d], distribution).pvalue > 1e-4


def test_a_saved_mixture_is_loaded(tmp_path: Path) -> None:
    policy = MixturePolicy(5, ACT, components=K)
    save_policy(tmp_path, TrainedPolicy(policy, observation_dim=5), algo="sft", action_dim=ACT)
    loaded, rows = load_policy(tmp_path), steps(6)["observation"]
    assert isinstance(loaded.module, MixturePolicy) and loaded.module.components == K
    action = loaded.act(rows.numpy())
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        means = policy(TensorDict({"observation": rows}, [6]))["action"]
    np.testing.assert_allclose(action, means, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(0, 2, 3), (5, 0, 3), (5, 2, 0)])
def test_empty_spaces_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="whole number from 1 on"):
        MixturePolicy(*sizes[:2], components=sizes[2])
