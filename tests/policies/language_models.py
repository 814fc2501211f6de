"""Tiny decoders of many families, and token batches for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tensordict import TensorDict
from torch import Tensor, nn

VOCABULARY = 97
_GROUPED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EIGHT = {"head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4}
_WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
# family -> (config class, what is its own)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("CohereConfig", {"logit_scale": 0.2}),
    "cohere2": ("Cohere2Config", {"logit_scale": 0.2, **_WINDOW}),
    "gemma": ("GemmaConfig", _EIGHT),
    "gemma2": ("Gemma2Config", {**_EIGHT, **_WINDOW, "final_logit_softcapping": 2.0}),
    "gemma3_text": ("Gemma3TextConfig", {**_EIGHT, **_WINDOW}),
    "glm4": ("Glm4Config", _EIGHT),
    "gpt2": ("GPT2Config", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0}),
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", _WINDOW),
    "phi3": ("Phi3Config", {}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, **_WINDOW}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3": ("Qwen3Config", _EIGHT),
    "qwen3_moe": ("Qwen3MoeConfig", {**_EXPERTS, **_EIGHT}),
    "smollm3": ("SmolLM3Config", {}),
    "starcoder2": ("Starcoder2Config", {}),
}


def decoder(
    family: str = "llama", *, dtype: torch.dtype = torch.float64, seed: int = 0, **own: Any
) -> Any:
    """A random decoder, in eval mode, whose tokens matter to each other."""
    name, settings = FAMILIES[family]
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, name)(**{**_GROUPED, **settings, **own})
    )
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2, generator=draw)
    return model.to(dtype).eval()


def longrope(switch: int, **own: Any) -> Any:
    """A decoder with other factors of LongRoPE in batches with a row above ``switch`` tokens."""
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4}
    rope |= {"long_factor": [4.0] * 4, "original_max_position_embeddings": switch}
    return decoder("phi3", rope_parameters=rope, original_max_position_embeddings=switch, **own)


def packed(
    lengths: tuple[int, ...] = (9, 1, 14, 6), *, seed: int = 0, assistant: float = 0.7
) -> TensorDict:
    """Trajectories of random tokens, a random share of them the assistant's, the last always."""
    draw = torch.Generator().manual_seed(seed)
    number = sum(lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    answered = torch.rand(number, generator=draw) < assistant
    answered[torch.tensor(lengths).cumsum(0) - 1] = True
    return TensorDict(
        {
            ("tokens", "full"): torch.randint(3, VOCABULARY, (number,), generator=draw),
            ("masks", "all_attention_mask"): torch.ones(number, dtype=torch.bool),
            ("masks", "all_assistant_mask"): answered,
            ("collector", "traj_ids"): ids,
        },
        batch_size=[number],
    )


def alone(model: Any, batch: TensorDict) -> Tensor:
    """The truth: each trajectory by itself, full logits, log_softmax, gather."""
    tokens, mask = batch["tokens", "full"], batch["masks", "all_assistant_mask"]
    parts = []
    for row in batch["collector", "traj_ids"].unique_consecutive():
        here = batch["collector", "traj_ids"] == row
        ids = tokens[here]
        logits = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        ours = logits[:-1].gather(1, ids[1:, None]).squeeze(1)
        parts.append(torch.cat([logits.new_zeros(1), torch.where(mask[here][1:], ours, 0.0)]))
    return torch.cat(parts)
