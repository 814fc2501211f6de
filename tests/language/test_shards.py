"""The moving average in one process against its definition, and its lack of side effects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from shards_models import DECAY, Average, decoder, packed, sharded, values
from torch import Tensor, nn

from iwsft import EMA, CausalLMPolicy, HardSync, ImportanceWeightedMLE
from iwsft.checkpoint import CheckpointError
from iwsft.language.shards import Shards


def _train(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> float:
    """One update; the loss before it."""
    optimizer.zero_grad()
    loss = -CausalLMPolicy(model).log_prob(packed(seed)).mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _same(ours: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    assert ours.keys() == true.keys()
    for name, value in ours.items():
        assert torch.equal(value, true[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_definition(dtype: torch.dtype) -> None:
    model = decoder().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    (shards, q), truth = sharded(model), Average(values(model))
    batch, whole = packed(99), decoder().double()
    for update in range(4):
        _train(model, optimizer, update)
        q.step()
        truth.step(values(model))
        whole.load_state_dict(truth.q, strict=False)
        whole.tie_weights()
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
        with shards.swapped():
            for name, value in values(model).items():
                error = (value.double() - truth.q[name]).abs().max() / truth.q[name].abs().max()
                assert float(error) < (2e-7 if dtype == torch.float32 else 1e-15)
            ours = CausalLMPolicy(model).log_prob(batch)
        expected = CausalLMPolicy(whole).log_prob(batch).to(dtype)
        torch.testing.assert_close(ours, expected.detach(), **tolerance)


def test_equals_the_updater_of_a_lagged_loss() -> None:
    model = decoder(tied=False)
    policy = CausalLMPolicy(model)
    loss = ImportanceWeightedMLE(policy, proposal="lagged", functional=False)
    updater, (shards, q) = EMA(loss, decay=DECAY), sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    for update in range(3):
        _train(model, optimizer, update)
        updater.step()
        q.step()
    with shards.swapped():
        _same(values(model), dict(loss.target_actor_network.model.named_parameters()))


def test_hard_sync_moves_shards_too() -> None:
    model = decoder()
    shards, _ = sharded(model)
    loss = ImportanceWeightedMLE(
        CausalLMPolicy(model), proposal="lagged", functional=False, hold_q=False
    )
    q = HardSync(loss, every=2, holder=shards)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    start = values(model)
    for update, synced in enumerate((False, True)):
        _train(model, optimizer, update)
        assert q.step() is synced
        _same(shards.state_dict(), values(model) if synced else start)


def test_starts_at_theta() -> None:
    model = decoder()
    before = values(model)
    shards, q = sharded(model, decay=0.9)
    with shards.swapped():
        _same(values(model), before)
    _same(values(model), before)


def test_training_does_not_see_it() -> None:
    losses = []
    for watched in (True, False):
        model = decoder()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
        shards, q = sharded(model)
        for update in range(4):
            if watched:
                with shards.swapped():
                    CausalLMPolicy(model).log_prob(packed(update))
            losses.append(_train(model, optimizer, update))
            q.step()
        assert all(p.grad is not None for p in model.parameters())
    assert losses[:4] == losses[4:]


def test_moves_where_bfloat16_would_not() -> None:
    start, rate, updates = 1.0, 1e-3, 400
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(model.weight, start)
    shards, q = sharded(model, decay=1 - rate)
    stuck = model.weight.detach().clone()
    nn.init.constant_(model.weight, 2.0)
    for _ in range(updates):
        q.step()
        stuck.lerp_(model.weight.detach(), rate)
    assert float(stuck) == start
    average = float(shards.state_dict()["weight"])
    assert average == pytest.approx(2 - (1 - rate) ** updates, rel=1e-5)
    with shards.swapped():
        assert model.weight.dtype == torch.bfloat16
        assert float(model.weight.detach()) == pytest.approx(average, rel=2**-8)
    assert float(model.weight.detach()) == 2.0


def test_adapters_alone() -> None:
    model = get_peft_model(decoder(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    (shards, q), truth = sharded(model), Average(values(model))
    average = shards.state_dict()
    assert all("lora_" in name for name in average) and len(average) == 8
    number = sum(value.numel() for value in average.values())
    assert number == model.get_nb_trainable_parameters()[0]
    before = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    for update in range(3):
        _train(model, optimizer, update)
        q.step()
        truth.step(values(model))
    with shards.swapped():
        for name, value in values(model).items():
            torch.testing.assert_close(value.double(), truth.q[name], rtol=1e-6, atol=1e-8)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))


def test_frozen_and_buffers_are_theta() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    shards, q = sharded(model)
    assert shards.state_dict().keys() == {"0.weight", "1.weight", "1.bias"}
    model(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    nn.init.constant_(model[0].bias, 5.0)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    q.step()
    mean = model[1].running_mean.clone()
    with shards.swapped():
        assert torch.equal(model[1].running_mean, mean)
        assert bool((model[0].bias == 5.0).all())


def test_no_gradient_within() -> None:
    model = decoder()
    shards, q = sharded(model)
    with shards.swapped():
        assert not CausalLMPolicy(model).log_prob(packed(0)).requires_grad
    assert CausalLMPolicy(model).log_prob(packed(0)).requires_grad


def test_gradient_of_a_forward_before() -> None:
    gradients = []
    for watched in (True, False):
        model = decoder()
        shards, q = sharded(model, decay=0.0)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        loss = CausalLMPolicy(model).log_prob(packed(0)).sum()
        if watched:
            with shards.swapped():
                CausalLMPolicy(model).log_prob(packed(0))
        loss.backward()
        gradients.append(model.lm_head.weight.grad)
    assert torch.equal(*gradients)


def test_exception_within() -> None:
    model = decoder()
    shards, q = sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    _train(model, optimizer, 0)
    before, q = values(model), dict(shards.state_dict())
    with pytest.raises(ZeroDivisionError), shards.swapped():
        _same(values(model), q)
        _ = 1 / 0
    _same(values(model), before)
    with shards.swapped():
        _same(values(model), q)
    _same(values(model), before)


def test_q_does_not_move_while_it_is_swapped_in() -> None:
    shards, q = sharded(decoder())
    with shards.swapped():
        with pytest.raises(RuntimeError, match="leave it first"):
            q.step()
        with pytest.raises(RuntimeError, match="swapped"), shards.swapped():
            pass
    q.step()


def test_a_model_without_trainable_parameters() -> None:
    with pytest.raises(ValueError, match="Linear has no trainable parameter"):
        Shards(nn.Linear(2, 1).requires_grad_(False))


def test_skipped_update_moves_nothing() -> None:
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    shards, q = sharded(model, optimizer=optimizer)
    nn.init.constant_(model.weight, 3.0)
    average = shards.state_dict()["weight"]
    start = average.clone()
    for factor, moves in ((torch.inf, False), (1.0, True)):
        optimizer.zero_grad()
        accelerator.backward(factor * model(torch.ones(1, 2)).sum())
        optimizer.step()
        q.step()
        assert torch.equal(average, start) is not moves


def test_resume() -> None:
    def run(model: Any, shards: Shards, q: EMA, updates: range) -> dict[str, Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
        for update in updates:
            _train(model, optimizer, update)
            q.step()
        with shards.swapped():
            return values(model)

    model = decoder()
    whole, q = sharded(model)
    run(model, whole, q, range(3))
    state, theta = whole.state_dict(), values(model)
    state = {name: value.clone() for name, value in state.items()}
    expected = run(model, whole, q, range(3, 6))

    again = decoder(seed=5)
    again.load_state_dict(theta, strict=False)
    again.tie_weights()
    resumed, q = sharded(again)
    resumed.load_state_dict(state)
    _same(run(again, resumed, q, range(3, 6)), expected)


def _of_fewer(state: dict[str, Any]) -> None:
    del state["model.norm.weight"]


def _of_more(state: dict[str, Any]) -> None:
    state["model.extra"] = torch.zeros(2)


def _of_another_format(state: dict[str, Any]) -> None:
    state["model.norm.weight"] = 1


def _of_another_shape(state: dict[str, Any]) -> None:
    state["model.norm.weight"] = torch.zeros(7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_of_fewer, "'model.norm.weight' differs"),
        (_of_more, "'model.extra' differs"),
        (_of_another_shape, "'model.norm.weight' differs"),
        (_of_another_format, "'model.norm.weight' differs"),
    ],
)
def test_foreign_state(change: Callable[[dict[str, Any]], None], message: str) -> None:
    shards, other = (Shards(decoder(seed)) for seed in (0, 1))
    before = {name: value.clone() for name, value in shards.state_dict().items()}
    state = other.state_dict()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        shards.load_state_dict(state)
    _same(shards.state_dict(), before)
