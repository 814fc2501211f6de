"""PEFT: the reference is the model without its adapters."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from language_models import alone, decoder, packed

from iwsft.policies import CausalLMPolicy


def lora(**settings: Any) -> tuple[CausalLMPolicy, Any]:
    """A policy whose adapter has moved, and the base model by itself."""
    torch.manual_seed(0)
    settings = {"target_modules": ["q_proj", "up_proj"], **settings}
    base = decoder(tie_word_embeddings=False)
    model = peft.get_peft_model(decoder(tie_word_embeddings=False), peft.LoraConfig(**settings))
    model = model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return CausalLMPolicy(model.eval()), base


def flags(policy: CausalLMPolicy) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in policy.named_parameters()}


def test_reference_is_the_model_without_its_adapter() -> None:
    policy, base = lora()
    batch, before = packed(), flags(policy)
    theta = policy.log_prob(batch)
    assert not policy.adapters_off
    with policy.reference():
        reference = policy.log_prob(batch)
        assert policy.adapters_off
    assert not policy.adapters_off
    assert torch.equal(reference, CausalLMPolicy(base).log_prob(batch))
    assert not torch.allclose(theta, reference)
    assert torch.equal(policy.log_prob(batch), theta)
    assert flags(policy) == before


def test_gradients_of_an_adapter_are_those_of_full_logits() -> None:
    policy, _ = lora()
    batch = packed()
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert 0 < len(trained) < len(list(policy.parameters()))
    truth = torch.autograd.grad(alone(policy.model, batch).square().sum(), trained)
    policy.log_prob(batch).square().sum().backward()
    torch.testing.assert_close([p.grad for p in trained], list(truth), rtol=1e-9, atol=1e-12)
    assert policy.model.get_output_embeddings().weight.grad is None


def test_an_error_within_leaves_everything_as_it_was() -> None:
    policy, _ = lora()
    before, first = flags(policy), policy.log_prob(packed())
    with pytest.raises(RuntimeError, match="broken"), policy.reference():
        raise RuntimeError("broken")
    assert flags(policy) == before and torch.equal(policy.log_prob(packed()), first)


def test_a_trained_copy_of_the_output_layer() -> None:
    policy, base = lora(modules_to_save=["lm_head"])
    batch = packed()
    with torch.no_grad():
        policy.model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    torch.testing.assert_close(
        policy.log_prob(batch), alone(policy.model, batch), rtol=1e-12, atol=1e-12
    )
    with policy.reference():
        assert torch.equal(policy.log_prob(batch), CausalLMPolicy(base).log_prob(batch))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="the output layer of Llama.*target_modules"):
        lora(target_modules=["lm_head"])
    plain = CausalLMPolicy(decoder())
    with pytest.raises(TypeError, match="LlamaForCausalLM has no adapters"), plain.reference():
        pass


def test_prompt_learning_is_refused() -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    policy = CausalLMPolicy(peft.get_peft_model(decoder(), config).double())
    with pytest.raises(NotImplementedError, match="prompt-learning"):
        policy.log_prob(packed())
