"""The loss over token trajectories."""

from __future__ import annotations

from typing import Any

from torch import nn

from iwsft.objective import ImportanceWeightedMLE
from iwsft.trajectory import ASSISTANT_MASK, TOKENS


def token_loss(policy: nn.Module, **settings: Any) -> ImportanceWeightedMLE:
    """:class:`~iwsft.ImportanceWeightedMLE` that reads tokens and the assistant mask.

    It holds the model itself (``functional=False``), as engines that shard it need.

    Args:
        policy: a :class:`~iwsft.CausalLMPolicy`.
        settings: of the loss.
    """
    loss = ImportanceWeightedMLE(policy, **{"functional": False, **settings})
    loss.loss_mask_key = ASSISTANT_MASK
    loss.set_keys(action=TOKENS)
    return loss
