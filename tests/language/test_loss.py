"""The loss over tokens and the means of its terms, against loops over trajectories."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from tensordict import TensorDict
from tiny import model, trajectories
from torch import nn
from torchrl.modules.llm.policies.common import Masks, Tokens
from transformers import AutoConfig, AutoModelForCausalLM

from iwsft.language.loss import Measures, token_loss
from iwsft.objective import ImportanceWeightedMLE, Terms
from iwsft.policies import CausalLMPolicy
from iwsft.trajectory import ASSISTANT_MASK, MASK, TOKENS, Segments

EXPERTS = {"num_local_experts": 4, "output_router_logits": True}
DBRX = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 1,
    "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
    "output_router_logits": True,
}


def _decoder(family: str, **own: Any) -> Any:
    """A tiny decoder of a family whose own loss may have more terms."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    if family == "dbrx":
        sizes, heads = {}, {}
    config = AutoConfig.for_model(family, **{**sizes, **heads, "vocab_size": 97, **own})
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("family", "own", "coefficient"),
    [
        ("mixtral", EXPERTS, "router_aux_loss_coef"),
        ("jetmoe", EXPERTS, "aux_loss_coef"),
        ("dbrx", {**DBRX, "ffn_config": {"ffn_hidden_size": 48}}, "moe_loss_weight"),
        ("qwen2", {"z_loss_coefficient": 0.1}, "z_loss_coefficient"),
    ],
)
def test_a_loss_of_the_model_itself_is_not_left_out(
    family: str, own: dict[str, Any], coefficient: str
) -> None:
    _is_refused(_decoder(family, **own), f"^{coefficient} adds a term")


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("loss_type", "ForMaskedLM", "a loss function of its own .ForMaskedLMLoss"),
        ("loss_function", nn.functional.cross_entropy, "a loss function of its own .cross_entropy"),
    ],
)
def test_a_loss_function_that_a_user_sets_is_not_left_out(
    name: str, value: Any, problem: str
) -> None:
    decoder = model()
    setattr(decoder, name, value)
    _is_refused(decoder, problem)
    with torch.no_grad():
        CausalLMPolicy(decoder).log_prob(trajectories(2))


def _is_refused(decoder: Any, problem: str) -> None:
    policy = CausalLMPolicy(decoder)
    with pytest.raises(ValueError, match=problem):
        token_loss(policy)
    # Nor in a loop of one's own.
    loss = ImportanceWeightedMLE(policy, proposal="reference", functional=False)
    loss.loss_mask_key = ASSISTANT_MASK
    loss.set_keys(action=TOKENS)
    with pytest.raises(ValueError, match=problem):
        loss(trajectories(2))


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("mixtral", {**EXPERTS, "router_aux_loss_coef": 0.0}),
        ("mixtral", {**EXPERTS, "output_router_logits": False}),
        ("dbrx", {**DBRX, "ffn_config": {"ffn_hidden_size": 48, "moe_loss_weight": 0.0}}),
        # A coefficient that no loss of the family reads.
        ("qwen2", {"router_aux_loss_coef": 0.1, "z_loss_coefficient": 0.0}),
    ],
)
def test_a_term_that_is_off_is_none(family: str, own: dict[str, Any]) -> None:
    assert not token_loss(CausalLMPolicy(_decoder(family, **own))).functional


def test_the_keys_of_a_call_are_those_of_token_trajectories() -> None:
    loss = token_loss(CausalLMPolicy(model()), proposal="reference")
    assert {*loss.in_keys} == {*trajectories().keys(True, True)}


def test_a_loss_that_does_not_read_the_assistant_mask_is_refused() -> None:
    """Prompts would make answers longer than they are."""
    loss = ImportanceWeightedMLE(CausalLMPolicy(model()), proposal="reference", functional=False)
    batch = trajectories(2)
    for _ in range(2):
        with pytest.raises(ValueError, match="loss_mask_key = .'masks', 'all_assistant_mask'"):
            loss(batch)
        # Also beside a mask that it does read.
        batch.set(MASK, torch.ones(len(batch), dtype=torch.bool))


@pytest.mark.parametrize("layout", [(2, 6), (2,)])
def test_the_masks_of_torchrl_are_not_left_unread_either(layout: tuple[int, ...]) -> None:
    attention = torch.arange(6) < torch.tensor([[6], [4]])
    answers = attention & (torch.arange(6) > 2)
    masks = {"all_attention_mask": attention, "all_assistant_mask": answers}
    loss = ImportanceWeightedMLE(CausalLMPolicy(model()), proposal="reference", functional=False)
    entries = {"ref_log_prob": torch.zeros(2, 6), ("collector", "mask"): attention}
    batch = TensorDict(entries, layout)
    batch["tokens"] = Tokens(full=torch.arange(12).view(2, 6), padded=True, batch_size=layout)
    batch["masks"] = Masks(**masks, padded=True, batch_size=layout)
    with pytest.raises(ValueError, match="loss_mask_key = .'masks', 'all_assistant_mask'"):
        loss(batch)
    loss.loss_mask_key = ASSISTANT_MASK
    assert loss(batch)["loss_iw_mle"].isfinite()


LENGTHS, COUNTS = [2, 3, 1, 4], [1, 2, 0, 3]


def _terms(seed: int, *, cached: bool = False, reference: bool = True) -> Terms:
    """Random terms of four trajectories, the third of which counts 0 times and holds NaN."""
    draw = torch.Generator().manual_seed(seed)
    index = torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))
    size = torch.tensor(LENGTHS)[index]
    off = torch.tensor(COUNTS)[index] == 0
    log_prob = torch.where(off, 0.0, -torch.rand(10, generator=draw))
    log_reference = torch.where(off, torch.nan, log_prob - torch.rand(10, generator=draw))
    weight = torch.rand(4, generator=draw)
    weight[2] = 3.0
    return Terms(
        segments=Segments(torch.Size([10]), index, None, 4),
        share=torch.tensor(COUNTS)[index].double() / size,
        log_prob=log_prob.requires_grad_(),
        log_weight=weight.log()[index],
        clipped=None if cached else off | (torch.rand(10, generator=draw) < 0.5),
        reference=log_reference if reference else None,
        data_weight=torch.rand(10, generator=draw),
    )


def _means(parts: list[Terms], clip_fraction: float) -> dict[str, float]:
    """The measures of one update, by a loop over its draws."""
    weights: list[float] = []
    lengths: list[int] = []
    unweighted = 0.0
    sums = dict.fromkeys(("log_prob", "kl_approx", "clip_fraction"), 0.0)
    for terms in parts:
        for row, count in enumerate(COUNTS):
            steps = [i for i, owner in enumerate(terms.segments.index.tolist()) if owner == row]
            weights += [math.exp(terms.log_weight[steps[0]].item())] * count
            lengths += [len(steps)] * count
            assert terms.data_weight is not None
            for i in steps:
                unweighted -= count * (terms.data_weight[i] * terms.log_prob[i]).item() / len(steps)
            for i in steps * count:
                log_prob, share = terms.log_prob[i].item(), 1 / len(steps)
                sums["log_prob"] += share * log_prob
                if terms.reference is not None:
                    kl = (terms.reference[i] - terms.log_prob[i]).item()
                    sums["kl_approx"] += share * kl
                known = clip_fraction if terms.clipped is None else bool(terms.clipped[i])
                sums["clip_fraction"] += share * known
    if parts[0].reference is None:
        del sums["kl_approx"]
    number = len(weights)
    return {
        "ESS": sum(weights) ** 2 / sum(w**2 for w in weights) / number,
        "weight_mean": sum(weights) / number,
        "weight_max": max(weights),
        "ESS_min": sum(weights) ** 2 / sum(w**2 for w in weights) / number,
        **{name: total / number for name, total in sums.items()},
        "unweighted_loss": unweighted / number,
        "weight_top1": max(weights) / sum(weights),
        "weight_length_corr": stats.spearmanr(weights, lengths).statistic,
        "weight_score_corr": stats.spearmanr(weights, weights).statistic,
    }


# Of the last update alone.
LAST = ("unweighted_loss", "weight_top1", "weight_length_corr", "weight_score_corr")


@pytest.mark.parametrize("own", [{}, {"cached": True}, {"reference": False}], ids=str)
@pytest.mark.parametrize("processes", [1, 2])
def test_measures_are_means_over_what_counts(own: dict[str, Any], processes: int) -> None:
    """Of two micro-batches an update and process; the log line is of two updates."""
    # The largest weight is in another micro-batch each time.
    updates = [[_terms(10 * update + part, **own) for part in range(4)] for update in range(2)]
    width = 4 // processes
    measures = [Measures() for _ in range(processes)]
    loss = token_loss(CausalLMPolicy(model()), reduction="sum")
    assert measures[0].collect(loss, lambda x: [x]) == {}
    for parts in updates:
        for process, each in enumerate(measures):
            each.begin()
            for terms in parts[process * width : (process + 1) * width]:
                each.add(terms, 0.75, terms.log_weight)

    values: list[Any] = []

    def gather(mine: Any) -> list[Any]:
        # A graph behind the sums would hold the activations of all updates.
        assert not any(x.requires_grad for x in (*mine[:2], *mine[2][0]))
        values.append(mine)
        return values

    collected = [each.collect(loss, gather) for each in measures][-1]
    by_update = [_means(parts, 0.75) for parts in updates]
    expected = {name: (by_update[0][name] + by_update[1][name]) / 2 for name in by_update[0]}
    expected |= {name: by_update[1][name] for name in LAST}
    for name, extreme in (("weight_max", max), ("ESS_min", min)):
        expected[name] = extreme(update[name] for update in by_update)
    assert by_update[0]["weight_max"] != by_update[1]["weight_max"]
    assert collected == pytest.approx(expected, rel=1e-6)
    assert measures[0].collect(loss, lambda x: [x]) == {}
