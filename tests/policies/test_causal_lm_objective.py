"""ImportanceWeightedMLE over a language model, against a loop over trajectories."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from language_models import alone, decoder, packed
from tensordict import TensorDict
from torch import Tensor
from transformers.integrations.neftune import neftune_post_forward_hook

from iwsft import ImportanceWeightedMLE, ImportanceWeights, annotate_reference, reweight, weights
from iwsft.language import token_loss
from iwsft.policies import CausalLMPolicy
from iwsft.proposals import EMA, HardSync
from iwsft.trajectory import MASK, MULTIPLICITY, REF_LOG_PROB, pad
from tests.oracles.family import eaft

ASSISTANT = ("masks", "all_assistant_mask")
PROPOSALS = ["current", "reference", "lagged", "cached"]
CHAIN = ImportanceWeights(
    step=[weights.Temperature(2.0)], reduce="mean", trajectory=[weights.ClipWeight(max=3.0)]
)


def moved(model: Any, seed: int) -> Any:
    other = deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    return other


def made(proposal: str, functional: bool) -> tuple[ImportanceWeightedMLE, TensorDict, Any, Any]:
    """A loss whose theta, q and reference differ, its batch, and models with theta and q."""
    start = decoder(tie_word_embeddings=True)
    theta, q = moved(start, 1), moved(start, 2)
    batch = annotate_reference(CausalLMPolicy(start), packed((9, 4, 14, 6)))
    batch[MULTIPLICITY] = torch.tensor([1, 3, 1, 2])[batch["collector", "traj_ids"]]
    policy = CausalLMPolicy(deepcopy(q if proposal in ("lagged", "cached") else theta))
    loss = token_loss(policy, importance_weights=CHAIN, proposal=proposal, functional=functional)
    if proposal == "cached":
        reweight(batch, loss)
    values = dict(theta.named_parameters())
    with torch.no_grad():
        for name, p in policy_parameters(loss).items():
            p.copy_(values[name])
    return loss, batch, theta, q


def policy_parameters(loss: ImportanceWeightedMLE) -> dict[str, Tensor]:
    """Parameters by their names in the model, tied ones once."""
    if not loss.functional:
        return dict(loss.actor_network.model.named_parameters())
    flat = loss.actor_network_params.flatten_keys(".").items()
    named = {name.removeprefix("model."): p for name, p in flat}
    return {n: p for n, p in named.items() if p.requires_grad and n != "lm_head.weight"}


def by_hand(batch: TensorDict, theta: Any, q: Any, proposal: str) -> Tensor:
    log_prob = alone(theta, batch)
    log_q = alone({"current": theta, "lagged": q, "cached": q}.get(proposal, theta), batch).detach()
    if proposal == "reference":
        log_q = batch[REF_LOG_PROB].double()
    total, draws = torch.zeros((), dtype=torch.float64), 0
    for row in batch["collector", "traj_ids"].unique():
        inside = batch["collector", "traj_ids"] == row
        # Nothing predicts the first token.
        here = inside & batch[ASSISTANT] & (inside.cumsum(0) > 1)
        ratio = (log_q[here] - batch[REF_LOG_PROB][here]).mean()
        weight = (2.0 * ratio).exp().clamp(max=3.0)
        drawn = int(batch[MULTIPLICITY][here][0])
        total = total - drawn * weight * log_prob[here].mean()
        draws += drawn
    return total / draws


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_loss_and_gradient_are_those_of_a_loop(proposal: str, functional: bool) -> None:
    loss, batch, theta, q = made(proposal, functional)
    truth = by_hand(batch, theta, q, proposal)
    truth.backward()
    for layout in (batch, pad(batch)):
        loss.zero_grad()
        out = loss(layout)
        # The reference is kept in float32.
        torch.testing.assert_close(out["loss_iw_mle"], truth, rtol=1e-6, atol=0)
        assert proposal == "reference" or float(out["weight_max"]) > 1.01
        out["loss_iw_mle"].backward()
        trained = policy_parameters(loss)
        assert trained.keys() == dict(theta.named_parameters()).keys()
        for name, parameter in theta.named_parameters():
            torch.testing.assert_close(
                trained[name].grad, parameter.grad, rtol=1e-6, atol=1e-9, msg=name
            )


@pytest.mark.parametrize("layout", ["packed", "no attention mask", "padded", "padded on the left"])
def test_first_tokens_do_not_count(layout: str) -> None:
    """Nothing predicts them, so they are not part of a length either."""
    loss, batch, _, _ = made("current", functional=False)
    if layout == "no attention mask":
        batch = batch.exclude(("masks", "all_attention_mask"))
    elif layout != "packed":
        batch = pad(batch)
    if layout == "padded on the left":
        mask = batch[MASK]
        rolled = [
            row.apply(partial(torch.roll, shifts=int((~m).sum()), dims=0))
            for row, m in zip(batch.unbind(0), mask, strict=True)
        ]
        batch = torch.stack(rolled).exclude(MASK)
    marked, unmarked = batch.clone(), batch.clone()
    ids = batch["collector", "traj_ids"].reshape(-1)
    attended = batch.get(("masks", "all_attention_mask"), torch.ones_like(batch[ASSISTANT]))
    for row in ids.unique():
        first = ((ids == row) & attended.reshape(-1)).nonzero()[0]
        marked[ASSISTANT].view(-1)[first] = True
        unmarked[ASSISTANT].view(-1)[first] = False
    torch.testing.assert_close(loss(marked), loss(unmarked), rtol=0, atol=0, equal_nan=True)


def test_masked_tokens_count_neither_in_the_loss_nor_in_lengths_nor_in_weights() -> None:
    loss, batch, theta, q = made("current", functional=False)
    first = loss(batch)
    other = batch.clone()
    other[REF_LOG_PROB][~batch[ASSISTANT]] = torch.nan
    second = loss(other)
    for key in ("loss_iw_mle", "ESS", "weight_max", "log_prob", "kl_approx"):
        assert torch.equal(first[key], second[key]), key
    fewer = batch.clone()
    fewer[ASSISTANT][batch["collector", "traj_ids"] == 2] = False
    with pytest.raises(ValueError, match="trajectory 2 has every step masked"):
        loss(fewer)


@pytest.mark.parametrize("functional", [False, True])
def test_q_updaters_follow(functional: bool) -> None:
    loss, batch, *_ = made("lagged", functional)
    EMA(loss, decay=0.5)
    ratio_of_theta = loss(batch)["weight_max"]
    assert torch.isfinite(ratio_of_theta)
    with torch.no_grad():
        for p in policy_parameters(loss).values():
            p.add_(0.01)
    before = loss(batch)["ESS"]
    sync = HardSync(loss, every=1)
    sync.step()
    lagged = loss(batch)["ESS"]
    assert not torch.equal(before, lagged)
    current, *_ = made("current", functional)
    with torch.no_grad():
        for name, p in policy_parameters(current).items():
            p.copy_(policy_parameters(loss)[name])
    torch.testing.assert_close(current(batch)["ESS"], lagged, rtol=1e-6, atol=0)


@pytest.mark.parametrize("functional", [False, True])
def test_tied_weights_move_once_an_update(functional: bool) -> None:
    theta = decoder(tie_word_embeddings=True)
    policy = CausalLMPolicy(theta)
    loss = ImportanceWeightedMLE(policy, proposal="lagged", functional=functional)
    q = EMA(loss, decay=0.9)
    before = {name: p.detach().clone() for name, p in policy_parameters(loss).items()}
    with torch.no_grad():
        for p in policy_parameters(loss).values():
            p.add_(1.0)
    q.step()
    targets = dict(
        loss.target_actor_network_params.flatten_keys(".").items()
        if functional
        else loss.target_actor_network.named_parameters()
    )
    for name, start in before.items():
        torch.testing.assert_close(targets[f"model.{name}"].detach(), start + 0.1)


@pytest.mark.parametrize("proposal", ["current", "lagged", "cached"])
@pytest.mark.parametrize("noise", [None, "dropout", "neftune"])
def test_weights_of_the_first_step_are_exactly_one(proposal: str, noise: str | None) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        policy = CausalLMPolicy(
            decoder(dtype=torch.float32, attention_dropout=0.5 if noise == "dropout" else 0.0)
        ).train()
        if noise == "neftune":
            embedding = policy.model.get_input_embeddings()
            embedding.neftune_noise_alpha = 5.0
            embedding.register_forward_hook(neftune_post_forward_hook)
        data = annotate_reference(policy, packed((9, 4, 14, 6, 33, 5, 60), seed=1), rows=40)
        loss = token_loss(policy, proposal=proposal)
        if proposal == "cached":
            reweight(data, loss, rows=70)
        for batch in (data, data[:13], pad(data[13:33])):
            out = loss(batch)
            assert float(out["weight_max"]) == float(out["weight_mean"]) == 1.0
            assert float(out["ESS"]) == 1.0
            assert (out["kl_approx"] == 0) == (noise is None) and policy.model.training
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_eaft_is_its_equation_on_all_logits(layout: str) -> None:
    """Loss and gradient of whole models, with the entropy from the chunked pass."""
    theta = decoder(tie_word_embeddings=True)
    batch = packed((9, 4, 14, 6))
    loss = token_loss(
        CausalLMPolicy(theta),
        importance_weights=ImportanceWeights.eaft(1.5, top_k=8),
        proposal="current",
    )
    ours = loss(batch if layout == "packed" else pad(batch))["loss_iw_mle"]
    truth, ids = torch.zeros((), dtype=torch.float64), batch["collector", "traj_ids"]
    for row in ids.unique():
        tokens, mask = batch["tokens", "full"][ids == row], batch[ASSISTANT][ids == row][1:]
        logits = theta(tokens[None]).logits[0, :-1]
        truth = truth + eaft(logits[mask], tokens[1:][mask], 1.5, 8).mean() / len(ids.unique())
    parameters = list(theta.parameters())
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(truth, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_eaft_with_noise_takes_the_entropy_of_the_quiet_pass() -> None:
    theta = decoder(tie_word_embeddings=True, attention_dropout=0.5).train()
    policy, batch = CausalLMPolicy(theta), packed((9, 4))
    chain = ImportanceWeights.eaft(top_k=8)
    terms = token_loss(policy, importance_weights=chain, proposal="current").terms(batch)
    _, quiet = CausalLMPolicy(theta.eval()).log_prob_and_entropy(batch, top_k=8)
    counts = terms.share > 0
    torch.testing.assert_close(terms.log_weight.exp()[counts], quiet[counts])
