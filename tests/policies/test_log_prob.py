"""Noise is seen wherever it comes from; padding becomes finite, and nothing else changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    set_composite_lp_aggregate,
)
from torch import Tensor, distributions, nn
from torchrl.modules import (
    IndependentNormal,
    MaskedCategorical,
    MaskedOneHotCategorical,
    OneHotCategorical,
    ProbabilisticActor,
    TanhNormal,
)
from torchrl.modules.distributions import LLMMaskedCategorical

from iwsft import ImportanceWeightedMLE, annotate_reference
from iwsft.policies.log_prob import finite_padding, noise_watch, step_log_prob
from iwsft.trajectory import MASK, Segments

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


def test_noise_is_seen_in_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    # Another library captures a graph on a GPU meanwhile.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for policy in (nn.Linear(2, 2), nn.Dropout(0.5)):
        drawn = noise_watch(policy, CPU)
        assert not drawn()
        torch.rand(1)
        assert drawn()


def test_noise_on_a_gpu_is_seen_in_its_own_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {GPU: torch.zeros(3), torch.device("cuda", 0): torch.zeros(3)}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device].clone())
    drawn = noise_watch(nn.Linear(2, 2), GPU)
    torch.rand(1)
    states[torch.device("cuda", 0)] += 1
    assert not drawn()
    states[GPU] += 1
    assert drawn()


@pytest.mark.parametrize("way", ["compiled", "captured"])
@pytest.mark.parametrize(
    ("p", "training", "drops"), [(0.5, True, True), (0.5, False, False), (0.0, True, False)]
)
def test_while_a_graph_is_made_dropout_layers_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, way: str, p: float, training: bool, drops: bool
) -> None:
    owner, name, device = {
        "compiled": (torch.compiler, "is_compiling", CPU),
        "captured": (torch.cuda, "is_current_stream_capturing", GPU),
    }[way]
    monkeypatch.setattr(owner, name, lambda: True)
    policy = nn.Sequential(nn.Linear(2, 2), nn.Dropout(p)).train(training)
    assert bool(noise_watch(policy, device)()) == drops


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_only_what_a_gradient_would_meet_on_masked_steps_is_replaced(
    shape: tuple[int, ...],
) -> None:
    nan, inf = torch.nan, torch.inf
    mask = torch.tensor([True, False, False, True, False, True]).reshape(shape)
    flat = torch.tensor([nan, nan, 5.0, 1.0, -inf, inf])
    batch = TensorDict(
        {
            "flat": flat.reshape(shape),
            "nested": {"wide": torch.stack([flat, 2 + torch.arange(6.0)], -1).reshape(*shape, 2)},
            "whole": torch.arange(6).reshape(shape),
            "other": flat.reshape(shape),
            "collector": {
                "mask": mask,
                "traj_ids": torch.tensor([0, 0, 0, 1, 1, 1]).reshape(shape),
            },
        },
        shape,
    )
    before = batch.clone()
    keys = ["flat", ("nested", "wide"), "whole", "missing"]
    out = finite_padding(batch, Segments.of(batch), keys)
    expected = torch.tensor([nan, 0.0, 5.0, 1.0, 0.0, inf])
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(out["flat"].reshape(-1), expected, **same)
    wide = torch.stack([expected, 2 + torch.arange(6.0)], -1)
    torch.testing.assert_close(out["nested", "wide"].reshape(6, 2), wide, **same)
    for key in ("whole", "other"):
        torch.testing.assert_close(out[key], before[key], **same)
    for key in ("flat", ("nested", "wide")):
        torch.testing.assert_close(batch[key], before[key], **same)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_observations_of_another_dtype_are_named(dtype: torch.dtype) -> None:
    policy, data = _actor(IndependentNormal, 2), TensorDict({"action": torch.zeros(3, 2)}, [3])
    data["observation"] = torch.ones(3, 4, dtype=dtype)
    with pytest.raises(ValueError, match=f"'observation' is {dtype}, and the policy is .*float32"):
        step_log_prob(policy, data, data.batch_size)
    # Nothing is wrong where a policy converts what it reads.
    policy.module[0].module[0].register_forward_pre_hook(lambda _, seen: seen[0].float())
    assert step_log_prob(policy, data, data.batch_size).shape == (3,)


def _actor(kind: type, size: int) -> ProbabilisticActor:
    """A TorchRL actor whose parameters are those of one linear layer."""
    network: nn.Module = nn.Linear(4, size)
    keys = ["logits"]
    if kind in (IndependentNormal, TanhNormal):
        network, keys = (
            nn.Sequential(nn.Linear(4, 2 * size), NormalParamExtractor()),
            [
                "loc",
                "scale",
            ],
        )
    masked = kind in (MaskedCategorical, MaskedOneHotCategorical)
    mask = {"mask": torch.ones(size, dtype=torch.bool)} if masked else {}
    module = TensorDictModule(network, in_keys=["observation"], out_keys=keys)
    return ProbabilisticActor(
        module, in_keys=keys, distribution_class=kind, distribution_kwargs=mask
    )


def _batch(action: Tensor, layout: tuple[int, ...]) -> TensorDict:
    return TensorDict({"observation": torch.randn(*layout, 4), "action": action}, layout)


@pytest.mark.parametrize("layout", [(6,), (2, 3), (1,)])
@pytest.mark.parametrize(
    ("kind", "size", "given"),
    [
        (IndependentNormal, 3, (1,)),
        (IndependentNormal, 1, ()),
        (TanhNormal, 3, (1,)),
        (OneHotCategorical, 6, ()),
        (OneHotCategorical, 6, (1,)),
        (MaskedOneHotCategorical, 6, ()),
    ],
)
def test_actions_that_a_density_would_broadcast_are_refused(
    kind: type, size: int, given: tuple[int, ...], layout: tuple[int, ...]
) -> None:
    batch = _batch(torch.zeros(*layout, *given), layout)
    with pytest.raises(ValueError, match=rf"actions have shape .* needs .*, {size}\]"):
        step_log_prob(_actor(kind, size), batch, torch.Size(layout))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (OneHotCategorical, (6, 6)),
        (IndependentNormal, (6, 6)),
        (distributions.Bernoulli, (6, 6)),
    ],
)
def test_actions_of_truth_values_are_numbers_or_an_index(kind: type, shape: Any) -> None:
    """Torch can't subtract them. An index may be one, for it is not computed with."""
    actor, given = _actor(kind, 6), torch.eye(6).bool()
    layout = torch.Size([6])
    with pytest.raises(ValueError, match=rf"torch.bool, and {kind.__name__} needs .*\.float\(\)"):
        step_log_prob(actor, _batch(given, (6,)), layout)
    plain = _actor(distributions.Categorical, 2)
    batch = _batch(torch.arange(6) % 2 == 1, (6,))
    found = step_log_prob(plain, batch, layout)
    batch["action"] = batch["action"].long()
    assert torch.equal(found, step_log_prob(plain, batch, layout))


@pytest.mark.parametrize("layout", [(6,), (3, 3)])
@pytest.mark.parametrize("kind", [OneHotCategorical, MaskedOneHotCategorical])
def test_one_hot_actions_have_the_log_prob_of_their_index(
    kind: type, layout: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    actor, index = _actor(kind, 6), torch.randint(6, layout)
    batch = _batch(nn.functional.one_hot(index, 6), layout)
    logits = actor.get_dist_params(batch)["logits"]
    expected = distributions.Categorical(logits=logits).log_prob(index)
    torch.testing.assert_close(step_log_prob(actor, batch, torch.Size(layout)), expected)
    # A density of indices broadcasts one-hot actions and an index in a dimension of its own.
    plain = _actor(distributions.Categorical, 6)
    for action in (nn.functional.one_hot(index, 6), index.unsqueeze(-1)):
        with pytest.raises(ValueError, match="one index or number for each step"):
            step_log_prob(plain, _batch(action, layout), torch.Size(layout))


class _TwoIndices(distributions.Independent):
    def __init__(self, logits: Tensor) -> None:
        logits = torch.stack([logits, -logits], -2)
        super().__init__(distributions.Categorical(logits=logits), 1)


class _Switches(distributions.Independent):
    def __init__(self, logits: Tensor) -> None:
        super().__init__(distributions.Bernoulli(logits=logits), 1)


class _ScaledBeta(distributions.Beta):
    """Of numbers in [-1, 1], although its support is said to be [0, 1]."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits.exp(), logits.exp() + 1)

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob((value + 1) / 2) - math.log(2)


_ROW = nn.functional.one_hot(torch.tensor([1, 0]), 3).float()


@pytest.mark.parametrize(
    ("kind", "possible", "impossible"),
    [
        (TanhNormal, [[1.0, -0.5, 0.0], [1.000001, 0.0, 0.0]], [[1.1, 0.0, 0.0], [0.0, -9.0, 0.0]]),
        (OneHotCategorical, _ROW, [[0.0, 0.0, 0.0], [0.5, 0.5, 0.0]]),
        (OneHotCategorical, _ROW.long(), [[0, 0, 0], [1, 1, 0]]),
        (MaskedOneHotCategorical, _ROW, [[0.0, 0.0, 2.0], [2.0, -1.0, 0.0]]),
        (distributions.Categorical, [1.0, 2.0], [1.5, 0.1]),
        (_TwoIndices, [[1.0, 2.0], [0.0, 1.0]], [[1.5, 0.0], [0.0, 0.1]]),
        (_Switches, [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]], [[-1.0, 0.0, 1.0], [0.0, 0.5, 0.0]]),
        (distributions.OneHotCategorical, _ROW, [[0.4, 0.3, 0.3], [2.0, -1.0, 0.0]]),
    ],
)
def test_actions_that_a_distribution_takes_for_others_have_probability_0(
    kind: type, possible: Any, impossible: Any
) -> None:
    torch.manual_seed(0)
    actions = torch.cat([torch.as_tensor(possible), torch.as_tensor(impossible)])
    actor, batch = _actor(kind, 3), _batch(actions, (4,))
    log_prob = step_log_prob(actor, batch, torch.Size([4]))
    torch.testing.assert_close(log_prob[:2], actor.log_prob(batch)[:2], rtol=0, atol=0)
    assert log_prob[:2].isfinite().all() and log_prob[2:].tolist() == [-torch.inf] * 2


def test_a_distribution_of_ones_own_says_itself_what_it_can_give() -> None:
    torch.manual_seed(0)
    actor = _actor(_ScaledBeta, 1)
    batch = _batch(torch.tensor([[-0.9], [0.0], [0.7]]), (3,))
    concentration = actor.get_dist_params(batch)["logits"].exp()
    expected = distributions.Beta(concentration, concentration + 1).log_prob(
        (batch["action"] + 1) / 2
    )
    actual = step_log_prob(actor, batch, torch.Size([3]))
    torch.testing.assert_close(actual, expected.squeeze(-1) - math.log(2))


@pytest.mark.parametrize("outside", [-100, -1, 3])
@pytest.mark.parametrize("kind", [distributions.Categorical, MaskedCategorical])
def test_an_index_that_a_distribution_does_not_have_counts_nowhere(
    kind: type, outside: int
) -> None:
    """Torch's gather refuses it, and its cross entropy takes -100 for the log-prob 0."""
    torch.manual_seed(0)
    actor, index = _actor(kind, 3), torch.tensor([[2, 0, 1], [1, outside, outside]])
    batch, shape = _batch(index, (2, 3)), torch.Size([2, 3])
    logits = actor.get_dist_params(batch)["logits"].detach().log_softmax(-1)
    right = [float(logits[0, step, index[0, step]]) for step in range(3)] + [float(logits[1, 0, 1])]
    log_prob = step_log_prob(actor, batch, shape).flatten()
    torch.testing.assert_close(log_prob[:4], torch.tensor(right))
    assert log_prob[4:].tolist() == [-torch.inf] * 2 and index[1, 1] == outside
    # Masked, it is padding: the loss is that of the four steps, and its gradient is finite.
    batch[MASK] = index != outside
    loss = ImportanceWeightedMLE(actor, proposal="reference")(batch)["loss_iw_mle"]
    torch.testing.assert_close(loss, -torch.tensor((sum(right[:3]) / 3 + right[3]) / 2))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in actor.parameters())
    reference = annotate_reference(actor, batch)["ref_log_prob"].flatten()
    torch.testing.assert_close(reference, torch.tensor([*right, 0.0, 0.0]))


def test_a_missing_action_is_named() -> None:
    for kind in (TanhNormal, distributions.Categorical):
        with pytest.raises(KeyError, match="action"):
            batch = _batch(torch.zeros(2), (2,)).exclude("action")
            step_log_prob(_actor(kind, 3), batch, torch.Size([2]))


class _Parts(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x[..., :3], x[..., :3].exp(), x


@pytest.mark.parametrize("layout", [(5,), (2, 4)])
def test_parts_of_a_composite_action_add_up_and_do_not_broadcast(layout: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, a, b = torch.randn(*layout, 4), torch.randn(*layout, 3), torch.randint(4, layout)
    batch = TensorDict({"observation": x, "a": a, "b": b}, layout)
    shape = torch.Size(layout)
    keys = [("params", "a", "loc"), ("params", "a", "scale"), ("params", "b", "logits")]
    parts = {"a": IndependentNormal, "b": distributions.Categorical}
    with set_composite_lp_aggregate(True):
        actor = ProbabilisticActor(
            TensorDictModule(_Parts(), ["observation"], keys),
            in_keys=["params"],
            out_keys=["a", "b"],
            distribution_class=CompositeDistribution,
            distribution_kwargs={"distribution_map": parts},
            return_log_prob=True,
        )
        of_a = distributions.Normal(x[..., :3], x[..., :3].exp()).log_prob(a).sum(-1)
        of_b = distributions.Categorical(logits=x).log_prob(b)
        torch.testing.assert_close(step_log_prob(actor, batch, shape), of_a + of_b)
        halves = step_log_prob(actor, batch.copy().set("b", b + 0.5), shape)
        assert halves.isneginf().all()
        with pytest.raises(ValueError, match="IndependentNormal needs"):
            step_log_prob(actor, batch.set("a", a[..., :1]), shape)


def test_masked_tokens_have_the_log_prob_of_a_categorical() -> None:
    torch.manual_seed(0)
    x, token = torch.randn(5, 2, 4), torch.randint(4, (5, 2))
    mask = torch.ones(5, 2, dtype=torch.bool)
    batch = TensorDict({"logits": x, "mask": mask, "action": token}, (5, 2))
    actor = ProbabilisticActor(
        TensorDictModule(nn.Identity(), ["logits"], ["logits"]),
        in_keys=["logits", "mask"],
        distribution_class=LLMMaskedCategorical,
    )
    expected = distributions.Categorical(logits=x).log_prob(token)
    torch.testing.assert_close(step_log_prob(actor, batch, torch.Size((5, 2))), expected)


@pytest.mark.parametrize("reads", ["observation", "first"])
@pytest.mark.parametrize("together", [True, False])
def test_several_draws_add_up_or_are_refused(reads: str, together: bool) -> None:
    """TorchRL draws an action anew before one that depends on it, whatever the data have."""
    torch.manual_seed(0)
    names = "observation", "first", "second"
    batch = TensorDict({name: torch.randn(5, 2) for name in names}, [5])
    heads = [nn.Sequential(nn.Linear(2, 4), NormalParamExtractor()) for _ in range(2)]
    modules, expected = [], torch.zeros(5)
    for head, seen, out in zip(heads, ("observation", reads), names[1:], strict=True):
        keys = {"loc": f"loc-{out}", "scale": f"scale-{out}"}
        density: Any = {"in_keys": keys, "distribution_class": IndependentNormal}
        draw = ProbabilisticTensorDictModule(out_keys=[out], **density)
        modules += [TensorDictModule(head, [seen], [*keys.values()]), draw]
        expected = expected + distributions.Normal(*head(batch[seen])).log_prob(batch[out]).sum(-1)
    policy = ProbabilisticTensorDictSequential(*modules, return_composite=together)
    with set_composite_lp_aggregate(True):
        if reads == "first" or not together:
            with pytest.raises(ValueError, match="draws 'first', 'second' in turn"):
                step_log_prob(policy, batch, batch.batch_size)
        else:
            torch.testing.assert_close(step_log_prob(policy, batch, batch.batch_size), expected)
