"""What the reference log-probs of tokens depend on, as a key for files that keep them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from iwsft.fingerprint import fingerprint
from iwsft.language.ranks import gathered
from iwsft.policies.causal_lm import CausalLMPolicy
from iwsft.policies.causal_lm_families import decoder_of
from iwsft.trajectory import ASSISTANT_MASK, ATTENTION_MASK, TOKENS, TRAJ_IDS

# Where the model came from, and a cache that is off in any case.
_NO_MATTER = ("_name_or_path", "use_cache")
_DATA_DIGITS, _REST_DIGITS = 16, 48


def data_digest(trajectories: TensorDictBase) -> str:
    """Digest of the tokens, the masks and the trajectory ids; with it a key begins."""
    keys = (TOKENS, ATTENTION_MASK, ASSISTANT_MASK, TRAJ_IDS)
    return fingerprint({str(key): trajectories.get(key) for key in keys})[:_DATA_DIGITS]


def reference_key(
    policy: CausalLMPolicy, data: str, batches: Sequence[Any], head: Tensor, *, group: Any = None
) -> str:
    """Key of everything that reference log-probs depend on, the same on all processes.

    That is: data; batches; the local shards of the weights and buffers on each process, adapters
    left out; the model's class and config, the policy's settings; attention implementation,
    autocast, matmul precision, device type, versions of torch and transformers; and the first
    log-probs themselves, in which anything else shows (code, kernels, hardware).

    To be called within the context that the log-probs are computed in.

    Args:
        policy: pi_ref; not just before its backward, for FSDP2's parameters are sharded again.
        data: :func:`data_digest`.
        batches: which batches are run, and how they are collated.
        head: log-probs of the first batch on this process, on the CPU.
        group: process group.

    Raises:
        ValueError: weights that are not in memory.
    """
    import transformers

    decoder = decoder_of(policy.model)
    config = {k: v for k, v in decoder.config.to_dict().items() if k not in _NO_MATTER}
    settings = {k: v for k, v in vars(policy).items() if not k.startswith("_") and k != "training"}
    mine = fingerprint({"weights": _weights_digest(policy), "head": head})
    device = next(policy.parameters()).device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    rest = fingerprint(
        {
            "batches": list(batches),
            "classes": [type(part).__qualname__ for part in (policy, policy.model, decoder)],
            "policy": sorted(settings.items()),
            "config": json.dumps(config, sort_keys=True, default=str),
            "attention": decoder.config._attn_implementation,
            "device": [device, torch.get_float32_matmul_precision(), autocast],
            "versions": [torch.__version__, transformers.__version__],
            "ranks": gathered(mine, group),
        }
    )
    return f"{data}-{rest[:_REST_DIGITS]}"


def local_shard(tensor: Any) -> Tensor:
    """What this process holds of a parameter or buffer: a view; all of it where nothing is sharded.

    Raises:
        ValueError: a shard that is not in memory (DeepSpeed's offload to NVMe).
    """
    shard = getattr(tensor, "ds_tensor", None)
    if shard is not None:
        if shard.status.name != "AVAILABLE":
            raise ValueError(
                "DeepSpeed keeps these parameters on NVMe, so they can't be looked at; pass "
                "cache=None, or offload parameters to the CPU"
            )
        # The last shards end in padding that is never written.
        left = tensor.ds_numel - shard.ds_numel * tensor.ds_zero_partition_rank
        return shard.detach().reshape(-1)[: max(left, 0)]
    # A DTensor (FSDP2) has a local part.
    held: Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return held.detach()


def _weights_digest(policy: CausalLMPolicy) -> str:
    for module in policy.modules():
        # FSDP2 keeps the outermost parameters gathered after a forward without backward.
        reshard = getattr(module, "reshard", None)
        if callable(reshard):
            reshard()
    adapters = _adapter_tensors(policy)
    named = chain(policy.named_parameters(), policy.named_buffers())
    return fingerprint({name: local_shard(x) for name, x in named if id(x) not in adapters})


def _adapter_tensors(policy: nn.Module) -> set[int]:
    """Ids of PEFT's own tensors, which have no part in the model without adapters."""
    found: set[int] = set()
    for module in policy.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            part = getattr(module, name, None)
            if isinstance(part, nn.Module):
                found.update(map(id, chain(part.parameters(), part.buffers())))
    return found
