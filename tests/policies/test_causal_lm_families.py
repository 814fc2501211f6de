"""Families of decoders: scaled and capped logits, several trajectories in a row, refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from language_models import FAMILIES, VOCABULARY, alone, decoder, longrope, packed
from torch import Tensor, nn

from iwsft.policies import CausalLMPolicy
from iwsft.policies.causal_lm_families import ONE_ROW_FAMILIES, LogitTransform

# Mixtures of experts have no float64 kernel; some families compute the softmax of attention in
# float32 where they take the plain attention.
_TOLERANCE = {torch.float64: 2e-6, torch.float32: 2e-5}


def test_all_families_of_one_row_are_tested() -> None:
    assert set(FAMILIES) == ONE_ROW_FAMILIES


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_log_prob_is_that_of_each_trajectory_alone(family: str) -> None:
    dtype = torch.float32 if "mo" in family and family != "smollm3" else torch.float64
    dtype = torch.float32 if family == "mixtral" else dtype
    model, batch = decoder(family, dtype=dtype), packed((9, 1, 14, 20))
    truth = alone(model, batch)
    for one_row in (False, True):
        ours = CausalLMPolicy(model, one_row=one_row).log_prob(batch)
        tolerance = _TOLERANCE[dtype]
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("one_row", [False, True])
def test_factors_that_the_longest_row_chooses_for_all_are_the_same_alone(one_row: bool) -> None:
    for switch, lengths in ((18, (9, 1, 18)), (18, (19, 40)), (40, (9, 40))):
        model, batch = longrope(switch), packed(lengths)
        ours = CausalLMPolicy(model, one_row=one_row).log_prob(batch)
        torch.testing.assert_close(ours, alone(model, batch), rtol=1e-12, atol=1e-12)
    policy = CausalLMPolicy(longrope(18), one_row=one_row)
    for read in (policy.log_prob, policy.check):
        with pytest.raises(ValueError, match="9 to 19 tokens.*up to 18.*longrope.*truncate to 18"):
            read(packed((9, 19)))


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_gradients_through_scaled_and_capped_logits(family: str) -> None:
    model, batch = decoder(family), packed((9, 5))
    assert LogitTransform.of(model) != LogitTransform()
    parameters = [p for p in model.parameters() if p.requires_grad]
    truth = torch.autograd.grad(alone(model, batch).square().sum(), parameters)
    out = CausalLMPolicy(model).log_prob(batch)
    gradients = torch.autograd.grad(out.square().sum(), parameters)
    for ours, true in zip(gradients, truth, strict=True):
        # Gemma 2 computes the softmax of attention in float32.
        assert float((ours - true).norm() / true.norm()) < 1e-5


def test_recurrent_and_leaking_families_take_a_row_a_trajectory() -> None:
    for config in (
        transformers.RwkvConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, context_length=64
        ),
        transformers.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        ),
    ):
        model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
        batch = packed((9, 1, 14, 20))
        ours = CausalLMPolicy(model).log_prob(batch)
        torch.testing.assert_close(ours, alone(model, batch), rtol=1e-6, atol=1e-6)
        with pytest.raises(ValueError, match="not keep trajectories of a row apart.*one_row=False"):
            CausalLMPolicy(model, one_row=True)


def test_an_unknown_change_of_logits_is_refused() -> None:
    model, batch = decoder(), packed()
    real = model.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        out = real(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = twice
    policy, none = CausalLMPolicy(model), batch.clone()
    none["masks", "all_assistant_mask"].zero_()
    # There is nothing to compare until a token is predicted.
    assert not bool(policy.log_prob(none).any())
    one = none.clone()
    one["masks", "all_assistant_mask"][4] = True
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM changes its logits"):
        policy.log_prob(one)


def test_logits_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[str] = []
    monkeypatch.setattr(LogitTransform, "check", lambda *args: checks.append(args[-1]))
    policy = CausalLMPolicy(decoder())
    for _ in range(2):
        policy.log_prob(packed())
    assert checks == ["LlamaForCausalLM"]


def test_a_head_that_sees_other_states_is_refused() -> None:
    model, batch = decoder(), packed()
    real = model.forward
    model.forward = lambda **inputs: real(**inputs, logits_to_keep=1)
    with pytest.raises(NotImplementedError, match="must see every token once"):
        CausalLMPolicy(model, one_row=False).log_prob(batch)
    model.forward = lambda **inputs: SimpleNamespace(
        logits=model.model(**inputs).last_hidden_state @ model.lm_head.weight.t()
    )
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM did not use its output layer"):
        CausalLMPolicy(model).log_prob(batch)
    model.forward = lambda **inputs: (real(**inputs), real(**inputs))[0]
    with pytest.raises(NotImplementedError, match="must see every token once"):
        CausalLMPolicy(model).log_prob(batch)


def test_bias_of_the_output_layer_counts() -> None:
    model, batch = decoder(), packed()
    model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY, dtype=torch.float64))
    ours = CausalLMPolicy(model).log_prob(batch)
    torch.testing.assert_close(ours, alone(model, batch), rtol=1e-12, atol=1e-12)


def test_a_certain_token_of_scaled_logits() -> None:
    model, batch = decoder("granite"), packed()
    batch["tokens", "full"].fill_(5)
    model.lm_head.bias = nn.Parameter(1e6 * torch.eye(VOCABULARY, dtype=torch.float64)[5])
    ours = CausalLMPolicy(model).log_prob(batch)
    ours.sum().backward()
    assert not bool(ours.any()) and not bool(model.lm_head.weight.grad.any())


class _OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


def _with_head(head: nn.Module) -> Any:
    model = decoder()
    model.lm_head = head
    return model


def _moved() -> Any:
    model = decoder()
    model.lm_head.forward = model.lm_head.forward
    return model


_SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: nn.Linear(3, 3), TypeError, "Linear is not a transformers model"),
        (lambda: decoder().model, ValueError, "LlamaModel has no output layer.*AutoModelForC"),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=50, d_model=8, d_kv=4, num_layers=1, num_heads=2)
            ),
            ValueError,
            "T5ForConditionalGeneration has an encoder",
        ),
        (
            lambda: transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=50, **_SMALL)),
            ValueError,
            "BertLMHeadModel sees tokens on both sides",
        ),
        (
            lambda: _with_head(_OwnForward(32, 97)),
            ValueError,
            r"\(_OwnForward\) has its own forward",
        ),
        (lambda: _with_head(nn.Sequential(nn.Linear(32, 97))), ValueError, r"\(Sequential\)"),
        (_moved, ValueError, r"\(Linear\) has its own forward.*offloading"),
    ],
)
def test_other_models_are_refused(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        CausalLMPolicy(make())


def test_bert_as_a_decoder_is_one() -> None:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, is_decoder=True, intermediate_size=32, **_SMALL
    )
    model, batch = transformers.BertLMHeadModel(config).double().eval(), packed()
    ours = CausalLMPolicy(model).log_prob(batch)
    torch.testing.assert_close(ours, alone(model, batch), rtol=1e-12, atol=1e-12)
