"""CausalLMPolicy against each trajectory by itself with full logits."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from language_models import alone, decoder, packed
from tensordict import TensorDict
from torch import Tensor, nn

from iwsft.forward_pass import ForwardPass
from iwsft.policies import CausalLMPolicy
from iwsft.trajectory import pack, pad

TOKENS, ATTENTION, ASSISTANT = (
    ("tokens", "full"),
    ("masks", "all_attention_mask"),
    ("masks", "all_assistant_mask"),
)


def flatten(padded: Tensor, batch: TensorDict) -> Tensor:
    return padded[batch[ATTENTION]]


@pytest.mark.parametrize("one_row", [None, False, True])
def test_log_prob_is_that_of_each_trajectory_alone(one_row: bool | None) -> None:
    model, batch = decoder(), packed()
    policy = CausalLMPolicy(model, one_row=one_row)
    truth = alone(model, batch)
    ours = policy.log_prob(batch)
    assert ours.shape == batch.shape and ours.dtype == torch.float64
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    off = ~batch[ASSISTANT] | (batch["collector", "traj_ids"].diff(prepend=torch.tensor([-1])) != 0)
    assert bool((ours[off] == 0).all()) and bool((ours[~off] < 0).all())
    padded = pad(batch)
    torch.testing.assert_close(
        flatten(policy.log_prob(padded), padded), truth, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("one_row", [False, True])
def test_gradients_of_weighted_log_probs_are_those_of_full_logits(one_row: bool) -> None:
    weight = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 9
    gradients = []
    for way in (CausalLMPolicy.log_prob, None):
        model, batch = decoder(tie_word_embeddings=True), packed()
        policy = CausalLMPolicy(model, one_row=one_row)
        log_prob = alone(model, batch) if way is None else way(policy, batch)
        (weight * log_prob).sum().backward()
        assert model.lm_head.weight is model.model.embed_tokens.weight
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], grad, rtol=1e-10, atol=1e-12, msg=name)


def test_padding_does_not_matter_on_either_side() -> None:
    model, batch = decoder(), packed()
    truth = alone(model, batch)
    right = pad(batch)
    left = right.clone()
    for key in (TOKENS, ATTENTION, ASSISTANT):
        for row, length in enumerate(right[ATTENTION].sum(1).tolist()):
            left[key][row] = right[key][row].roll(right.shape[1] - length)
    policy = CausalLMPolicy(model)
    for padded in (right, left):
        padded = padded.exclude(("collector", "mask"), ("collector", "traj_ids"))
        padded[TOKENS][~padded[ATTENTION]] = -100
        padded[ASSISTANT][~padded[ATTENTION]] = True
        ours = policy.log_prob(padded)
        assert bool((ours[~padded[ATTENTION]] == 0).all())
        torch.testing.assert_close(flatten(ours, padded), truth, rtol=1e-12, atol=1e-12)


def test_a_padded_row_may_hold_several_trajectories() -> None:
    model, batch = decoder(), packed((5, 7, 4, 8))
    rows = batch.reshape(2, 12)
    assert rows["collector", "traj_ids"].unique().numel() == 4
    ours = CausalLMPolicy(model).log_prob(rows)
    torch.testing.assert_close(ours.reshape(-1), alone(model, batch), rtol=1e-12, atol=1e-12)


def test_time_inside_a_batch_of_rows() -> None:
    model, padded = decoder(), pad(packed())
    inside = TensorDict(padded.exclude("collector").to_dict(), batch_size=[4])
    policy = CausalLMPolicy(model)
    assert torch.equal(policy.log_prob(inside), policy.log_prob(padded))


def test_attention_mask_may_be_absent_in_a_packed_batch() -> None:
    model, batch = decoder(), packed()
    policy = CausalLMPolicy(model)
    assert torch.equal(policy.log_prob(batch.exclude(ATTENTION)), policy.log_prob(batch))


def test_masked_tokens_are_context_and_left_out_tokens_are_not() -> None:
    model, batch = decoder(), packed((12,), assistant=1.0)
    policy = CausalLMPolicy(model)
    full = policy.log_prob(batch)
    some = batch.clone()
    some[ASSISTANT][3:6] = False
    assert torch.equal(policy.log_prob(some), torch.where(some[ASSISTANT], full, 0.0))
    without = batch.clone()
    without[ATTENTION][3:6] = False
    short = batch[torch.tensor([0, 1, 2, *range(6, 12)])]
    torch.testing.assert_close(policy.log_prob(without)[without[ATTENTION]], policy.log_prob(short))
    assert not torch.allclose(policy.log_prob(without)[6:], full[6:])


def test_no_token_of_the_assistant_gives_zeros_that_can_be_differentiated() -> None:
    model, batch = decoder(), packed()
    batch[ASSISTANT].zero_()
    out = CausalLMPolicy(model).log_prob(batch)
    assert bool((out == 0).all())
    out.sum().backward()
    assert all(bool((p.grad == 0).all()) for p in model.parameters())


def test_only_assistant_tokens_reach_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    from iwsft.policies import causal_lm

    seen: list[int] = []
    real = causal_lm.token_log_prob_and_entropy

    def counted(hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        seen.append(len(hidden))
        return real(hidden, *args, **kwargs)

    monkeypatch.setattr(causal_lm, "token_log_prob_and_entropy", counted)
    batch = packed((60, 50, 60))
    batch[ASSISTANT].zero_()
    batch[ASSISTANT][40:60] = True
    CausalLMPolicy(decoder()).log_prob(batch)
    assert seen == [32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_log_probs_are_float32_under_autocast_and_with_half_weights(dtype: torch.dtype) -> None:
    model, batch = decoder(dtype=dtype), packed()
    exact = alone(decoder(), batch).float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        ours = CausalLMPolicy(model).log_prob(batch)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact, rtol=0.1, atol=0.15)
    # A bfloat16 holds 8 bits: log-probs that went through one would all be on its grid.
    assert not torch.equal(ours, ours.bfloat16().float())
    ours.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    outcomes = []
    for checkpointing in (False, True):
        model, batch = decoder(), packed()
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        out = CausalLMPolicy(model).log_prob(batch)
        out.sum().backward()
        outcomes.append([out.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-12, atol=1e-14)


def test_chunks_of_packed_and_padded_batches_agree() -> None:
    model, batch = decoder(), packed((9, 3, 14, 6, 20, 5, 11))
    policy = CausalLMPolicy(model.train())
    truth = alone(model, batch)
    for rows in (1, 25, 10_000):
        ours = ForwardPass(policy, batch, rows=rows).log_prob()
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
        padded = pad(batch)
        ours = ForwardPass(policy, padded, rows=rows).log_prob()
        torch.testing.assert_close(flatten(ours, padded), truth, rtol=1e-12, atol=1e-12)
    assert model.training


def test_one_thread_gives_the_same_bits_in_any_batch_of_short_trajectories() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        draw = torch.Generator().manual_seed(0)
        lengths = torch.randint(2, 64, (40,), generator=draw)
        batch = packed(tuple(lengths.tolist()))
        policy = CausalLMPolicy(decoder(dtype=torch.float32), one_row=False)
        whole = ForwardPass(policy, batch).log_prob()
        ends = lengths.cumsum(0)
        for size in (1, 3, 16):
            for first in range(0, 40, size):
                last = min(first + size, 40) - 1
                here = slice(int(ends[first] - lengths[first]), int(ends[last]))
                part = pad(batch[here]) if first % 2 else batch[here]
                ours = policy.log_prob(part)
                ours = flatten(ours, part) if first % 2 else ours
                assert torch.equal(ours.detach(), whole[here])
    finally:
        torch.set_num_threads(threads)


def test_attention_of_variable_length_gets_the_restarting_positions() -> None:
    # Imitates flash_attention_2: without a mask, positions separate the sequences.
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
    from transformers.modeling_utils import AttentionInterface

    def varlen(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        assert mask is None and query.shape[0] == 1
        starts = (kwargs["position_ids"][0] == 0).nonzero().squeeze(1).tolist()
        groups = query.shape[1] // key.shape[1]
        parts = [
            nn.functional.scaled_dot_product_attention(
                query[:, :, a:b],
                key[:, :, a:b].repeat_interleave(groups, 1),
                value[:, :, a:b].repeat_interleave(groups, 1),
                is_causal=True,
                scale=kwargs["scaling"],
            )
            for a, b in zip(starts, [*starts[1:], query.shape[2]], strict=True)
        ]
        return torch.cat(parts, 2).transpose(1, 2).contiguous(), None

    AttentionInterface.register("by_positions", varlen)
    AttentionMaskInterface.register("by_positions", flash_attention_mask)
    for family in ("llama", "qwen2", "gpt2"):
        batch = packed()
        model = decoder(family, **({"layer_types": None} if family == "qwen2" else {}))
        truth = alone(model, batch)
        model.set_attn_implementation("by_positions")
        for layout in (batch, pad(batch)):
            ours = pack(layout.set("x", CausalLMPolicy(model, one_row=True).log_prob(layout)))["x"]
            torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_hooks_run_around_the_output_layer_and_casts_on_the_way_out_do_not_matter() -> None:
    # As engines do: parameters come with the call of their module, outputs are cast at the end.
    model, batch = decoder(dtype=torch.float32), packed()
    full = model.lm_head.weight.detach().clone()
    order: list[str] = []

    def gather(module: nn.Module, args: Any) -> None:
        order.append("gather")
        module.weight.data = full.clone()

    def release(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        module.weight.data = torch.empty(0)
        return output.view_as(output)

    truth = alone(model, batch).detach()
    model.lm_head.register_forward_pre_hook(gather)
    model.lm_head.register_forward_hook(release)
    model.register_forward_hook(
        lambda module, args, output: type(output)(logits=output.logits.bfloat16())
    )
    out = CausalLMPolicy(model).log_prob(batch)
    assert order == ["gather"] and model.lm_head.weight.numel() == 0
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model, batch = decoder("gemma2"), packed()
    before = model(input_ids=batch[TOKENS][None]).logits
    policy = CausalLMPolicy(model)
    policy.log_prob(batch)
    batch[TOKENS][0] = 10_000
    with pytest.raises(ValueError, match="10000 is outside the vocabulary"):
        policy.log_prob(batch)
    batch = packed()
    assert torch.equal(model(input_ids=batch[TOKENS][None]).logits, before)
    assert "forward" not in vars(model.lm_head)
    keys = set(batch.keys(True, True))
    policy.log_prob(batch)
    assert set(batch.keys(True, True)) == keys


def test_a_copy_is_a_policy_of_its_own() -> None:
    model, batch = decoder(), packed()
    policy = CausalLMPolicy(model)
    first = policy.log_prob(batch)
    copy = deepcopy(policy)
    with torch.no_grad():
        copy.model.lm_head.weight.mul_(2)
    assert torch.equal(policy.log_prob(batch), first)
    assert not torch.allclose(copy.log_prob(batch), first)


def test_an_engine_around_the_model_takes_its_place() -> None:
    class Engine(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, **inputs: Any) -> Any:
            self.calls += 1
            return self.module(**inputs)

    model, batch = decoder(), packed()
    policy = CausalLMPolicy(model)
    first = policy.log_prob(batch)
    policy.model = Engine(model)
    assert torch.equal(policy.log_prob(batch), first)
    assert policy.model.calls == 1


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda b: b.exclude(TOKENS), KeyError, r"tokens.*full.*is not in the batch"),
        (lambda b: b.exclude(ASSISTANT), KeyError, "all_assistant_mask.*is not in the batch"),
        (lambda b: pad(b).exclude(ATTENTION), KeyError, "all_attention_mask.*is not in"),
        (lambda b: b.exclude(("collector", "traj_ids")), KeyError, "traj_ids"),
        (lambda b: b.set(TOKENS, b[TOKENS].float()), ValueError, "must hold integers"),
        (lambda b: b.set(TOKENS, -b[TOKENS]), ValueError, "outside the vocabulary.*resize"),
        (
            lambda b: b.set(TOKENS, torch.full_like(b[TOKENS], 97)),
            ValueError,
            r"token 97 is outside the vocabulary of LlamaForCausalLM \(97 tokens",
        ),
        (lambda b: packed((65, 3)), ValueError, "has 65 tokens, .* reads 64"),
        (lambda b: b.set(ATTENTION, torch.zeros(30, dtype=torch.bool)), ValueError, "no token"),
    ],
)
def test_bad_batches_are_refused(
    change: Callable[[TensorDict], TensorDict], error: type[Exception], words: str
) -> None:
    policy = CausalLMPolicy(decoder())
    for read in (policy.log_prob, policy.check):
        with pytest.raises(error, match=words):
            read(change(packed()))


def test_context_is_full_at_its_limit_and_not_that_of_a_packed_batch() -> None:
    model, batch = decoder(), packed((64, 64, 3))
    for one_row in (False, True):
        ours = CausalLMPolicy(model, one_row=one_row).log_prob(batch)
        torch.testing.assert_close(ours, alone(model, batch), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_model_may_name_no_context(limit: int) -> None:
    model, batch = decoder(), packed((15, 17))
    model.config.max_position_embeddings = limit
    torch.testing.assert_close(
        CausalLMPolicy(model).log_prob(batch), alone(model, batch), rtol=1e-12, atol=1e-12
    )
    model.config.max_position_embeddings = 1
    with pytest.raises(ValueError, match="has 17 tokens, LlamaForCausalLM reads 1 "):
        CausalLMPolicy(model).log_prob(batch)


@pytest.mark.parametrize(
    ("lengths", "width"), [((15, 3), 16), ((16,), 16), ((17, 1, 17), 32), ((49, 2), 50)]
)
def test_rows_are_hardly_longer_than_a_trajectory(lengths: tuple[int, ...], width: int) -> None:
    model = decoder(max_position_embeddings=50)
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, args, inputs: shapes.append((*inputs["input_ids"].shape,)), with_kwargs=True
    )
    CausalLMPolicy(model, one_row=False).log_prob(packed(lengths))
    assert shapes == [(len(lengths), width)]


def test_the_first_and_the_last_token_of_the_vocabulary() -> None:
    model, batch = decoder(), packed()
    batch[TOKENS][3:5] = torch.tensor([0, 96])
    batch[ASSISTANT][3:5] = True
    torch.testing.assert_close(
        CausalLMPolicy(model).log_prob(batch), alone(model, batch), rtol=1e-12, atol=1e-12
    )


def test_a_table_of_learned_positions_may_have_any_number_of_rows() -> None:
    model, batch = decoder("gpt2", n_positions=50), packed((50, 49))
    torch.testing.assert_close(
        CausalLMPolicy(model).log_prob(batch), alone(model, batch), rtol=1e-12, atol=1e-12
    )


def test_in_keys_are_the_entries_that_are_read() -> None:
    assert CausalLMPolicy(decoder()).in_keys == [TOKENS, ATTENTION, ASSISTANT]
