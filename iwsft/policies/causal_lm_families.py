"""How families of transformers decoders differ around their output layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Families that keep the trajectories of one row apart when positions restart; all are tested.
# Others leak although they read positions (gpt_oss, granitemoe and opt do in transformers 5.23), or
# carry a state over (state spaces, convolutions, linear attention).
ONE_ROW_FAMILIES = frozenset(
    (
        *("cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox"),
        *("granite", "llama", "mistral", "mixtral", "olmo2", "olmo3", "phi3", "qwen2"),
        *("qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2"),
    )
)
_NOT_CAUSAL = frozenset({"cpmant", "xlnet"})
# Coefficients of terms of a model's own loss, in the configs of transformers: those of the routers
# of a mixture, and those of any model.
_ROUTER_TERMS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
_TERMS = ("z_loss_coefficient",)
# Casts of engines on the way out may have rounded to bfloat16.
_CAST_TOLERANCE = 1e-2


def decoder_of(model: nn.Module) -> Any:
    """The transformers model in its wrappings (PEFT, engines, data parallelism, a compiler)."""
    inner: Any = model
    while inner is not None and not hasattr(type(inner), "get_output_embeddings"):
        unwrap = getattr(inner, "get_base_model", None)
        inner = unwrap() if callable(unwrap) else _inside(inner)
    if inner is None:
        raise TypeError(f"{type(model).__name__} is not a transformers model")
    return inner


def peft_model(model: nn.Module) -> Any:
    """The PEFT model in its wrappings (engines, data parallelism, a compiler)."""
    inner: Any = model
    while inner is not None and not hasattr(inner, "peft_config"):
        inner = _inside(inner)
    # A transformers model with adapters of its own has the attribute, but no way to turn them off.
    if not hasattr(inner, "disable_adapter"):
        raise TypeError(f"{type(model).__name__} has no adapters; use peft.get_peft_model")
    return inner


def _inside(wrapper: Any) -> Any:
    return getattr(wrapper, "module", None) or getattr(wrapper, "_orig_mod", None)


def check_decoder(model: nn.Module) -> Any:
    """The decoder in ``model``, if its output layer can compute log-probs; else a ValueError."""
    decoder = decoder_of(model)
    name = type(decoder).__name__
    config = decoder.config.get_text_config()
    if decoder.config.is_encoder_decoder:
        raise ValueError(f"{name} has an encoder and a decoder; only decoders are policies here")
    head = decoder.get_output_embeddings()
    if head is None:
        raise ValueError(f"{name} has no output layer; load it with AutoModelForCausalLM")
    # BERT and its relatives see both sides by default; causal families have no such setting.
    both_sides = hasattr(config, "add_cross_attention") and not getattr(config, "is_decoder", True)
    if both_sides or config.model_type in _NOT_CAUSAL or not decoder.can_generate():
        raise ValueError(f"{name} sees tokens on both sides; load a causal decoder")
    if getattr(config, "unpadded_vocab_size", None) not in (None, config.vocab_size):
        raise ValueError(f"{name} cuts its vocabulary after the output layer: not supported")
    # PEFT puts a layer that is trained as a whole and the original into a container.
    heads = [head]
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        heads = [head.original_module, *copies.values()]
    for layer in heads:
        plain = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
        if not plain or "forward" in vars(layer):
            problem = f"the output layer of {name} ({type(layer).__name__}) has its own forward"
            places = "adapters (target_modules), quantization and offloading"
            raise ValueError(f"{problem}; leave it out of {places}")
    return decoder


def context_of(config: Any) -> int | None:
    """Most tokens that a model of this config reads; None where it names no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def switch_of(config: Any) -> int | None:
    """Most tokens of a row with short factors; a longer one has others at all its positions."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    # Some families have parameters for each type of layer.
    for part in (rope, *rope.values()):
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            return int(part["original_max_position_embeddings"])
    return None


def check_switch(config: Any, trajectory: Tensor) -> None:
    """Refuse trajectories that change each other's log-probs; each token has the number of its own.

    transformers chooses the factors of LongRoPE for a whole batch, by its longest row.
    """
    switch = switch_of(config)
    if switch is None:
        return
    sizes = trajectory.bincount()
    sizes = sizes[sizes > 0]
    if bool((sizes > switch).any() and (sizes <= switch).any()):
        found = f"trajectories have {int(sizes.min()):,} to {int(sizes.max()):,} tokens"
        name = config.get_text_config().model_type
        problem = f"{name} reads those of up to {switch:,} otherwise beside longer ones (longrope)"
        raise ValueError(f"{found}, and {problem}: truncate to {switch:,}, or train them apart")


def check_own_loss(decoder: Any) -> None:
    """Refuse a decoder whose own loss is more than the likelihood of the tokens.

    Its config adds terms then, or somebody set a loss function.
    """
    # Loaded with the decoder; its package takes seconds.
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    configs = {id(config): config for config in (decoder.config, decoder.config.get_text_config())}
    holders = [c for c in configs.values() if getattr(c, "output_router_logits", False)]
    holders += [config.ffn_config for config in holders if hasattr(config, "ffn_config")]
    names = [name for name in _ROUTER_TERMS for x in holders if getattr(x, name, 0)]
    names += [name for name in _TERMS for x in configs.values() if getattr(x, name, 0)]
    if names:
        problem = f"{names[0]} adds a term to the model's own loss, which is not trained here"
        raise ValueError(f"{problem}: set it to 0 in model.config")
    chosen = str(getattr(decoder, "loss_type", None))
    own = vars(decoder).get("_loss_function", LOSS_MAPPING.get(chosen, ForCausalLMLoss))
    if own is not ForCausalLMLoss:
        name = f"{type(decoder).__name__} has a loss function of its own"
        problem = f"{name} ({getattr(own, '__name__', own)}), which is not trained here"
        raise ValueError(f"{problem}; remove it (loss_type, loss_function)")


def fits_one_row(decoder: Any) -> bool:
    """Whether the model keeps the trajectories of one row apart by positions that restart."""
    return decoder.config.get_text_config().model_type in ONE_ROW_FAMILIES


def varies_lengths(decoder: Any) -> bool:
    """Whether attention runs on the trajectories of a row one by one, without a mask."""
    attention = str(decoder.config._attn_implementation)
    return "flash" in attention or "flex" in attention


@dataclass(frozen=True)
class LogitTransform:
    """``softcap * tanh(scale * logits / softcap)``, or ``scale * logits`` without a cap."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, decoder: Any) -> LogitTransform:
        """The transform of the model's family."""
        config = decoder.config.get_text_config()
        family = config.model_type
        scale = 1.0
        if family.startswith("granite"):
            scale = 1.0 / config.logits_scaling
        elif family.startswith("hyperclovax"):
            scale = config.logits_scaling
        elif family.startswith("cohere"):
            scale = decoder.logit_scale
        elif family == "falcon_h1":
            scale = config.lm_head_multiplier
        cap = getattr(config, "final_logit_softcapping", None)
        if family == "recurrent_gemma":
            cap = config.logits_soft_cap
        return cls(float(scale), None if cap is None else float(cap))

    def check(self, before: Tensor, after: Tensor, name: str) -> None:
        """Refuse a model ``name`` whose logits ``after`` are not this transform of ``before``."""
        expected = before * self.scale
        if self.softcap is not None:
            expected = self.softcap * torch.tanh(expected / self.softcap)
        # NaN comes from the weights; the code that uses the log-probs reports it.
        same = after.shape == before.shape and torch.allclose(
            after.to(expected.dtype),
            expected,
            rtol=_CAST_TOLERANCE,
            atol=_CAST_TOLERANCE,
            equal_nan=True,
        )
        if not same:
            raise NotImplementedError(
                f"{name} changes its logits after the output layer in an unknown way, not by {self}"
            )
