"""A causal language model as a policy over tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from iwsft.policies.causal_lm_families import (
    LogitTransform,
    check_decoder,
    check_own_loss,
    check_switch,
    context_of,
    fits_one_row,
    peft_model,
    switch_of,
    varies_lengths,
)
from iwsft.policies.linear import onednn_layers, replaced_forward
from iwsft.policies.token_log_prob import token_log_prob_and_entropy
from iwsft.trajectory import ASSISTANT_MASK, ATTENTION_MASK, TOKENS, Segments, fit

# Rows and the states of the output layer come in multiples of this: kernels for a few rows, and for
# what is left over of a row, differ from the others in the last bits.
_MULTIPLE = 16


class CausalLMPolicy(nn.Module):
    """log p of each assistant token under a transformers decoder.

    ``log_prob(trajectories)`` gives, in the layout of the batch, at each token of the assistant
    mask ``log p(token | tokens before it in its trajectory)``, and 0 elsewhere and at the first
    token of a trajectory. It is float32 (float64 for a float64 model), also under autocast or
    with half-precision weights. Tokens that the attention mask leaves out do not exist for the
    model, whether they are on the left or on the right.

    The same trajectory in another batch or layout has the same log-probs up to rounding (1e-6 in
    float32), and in batches of the same shape exactly. Only the states that predict assistant
    tokens go through the output layer, within its forward call, so that the hooks of engines run;
    their logits are never all in memory (:mod:`iwsft.policies.token_log_prob`).

    The attention mask may be absent in a packed batch, which needs trajectory ids.
    :func:`iwsft.language.token_loss` is the loss of it.

    Args:
        model: A causal decoder with its output layer (``AutoModelForCausalLM``), possibly with
            PEFT adapters, or an engine around one. An engine that is made later replaces it:
            ``policy.model = engine``.
        one_row: Form of the model's input, for batches of either layout. True: all trajectories in
            one row with positions that restart, kept apart by variable-length attention
            (``attn_implementation="flash_attention_2"`` and such) or by a mask, at the square of
            the row's length. False: a row for each trajectory, padded to the longest. None: one row
            if attention has variable length and the family is known to keep trajectories apart.

    Raises:
        TypeError: The model is not a transformers model.
        ValueError: The model is not a causal decoder, its output layer is not a plain
            ``torch.nn.Linear``, or its family can't keep the trajectories of one row apart.
    """

    in_keys: list[NestedKey] = [TOKENS, ATTENTION_MASK, ASSISTANT_MASK]

    def __init__(self, model: nn.Module, *, one_row: bool | None = None) -> None:
        super().__init__()
        decoder = check_decoder(model)
        if one_row and not fits_one_row(decoder):
            name = type(decoder).__name__
            raise ValueError(f"{name} does not keep trajectories of a row apart: one_row=False")
        self.model = model
        self.one_row = one_row
        # Public, so that the key of a cached reference contains it.
        self.adapters_off = False
        self._after_head_checked = False

    def log_prob(self, trajectories: TensorDictBase) -> Tensor:
        """log p of each assistant token, see :meth:`log_prob_and_entropy`."""
        return self.log_prob_and_entropy(trajectories, top_k=0)[0]

    def log_prob_and_entropy(
        self, trajectories: TensorDictBase, *, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """log p of each assistant token, and the entropy of the distribution that it is from.

        Both are in the layout of the batch, 0 elsewhere, and of one pass. For the entropy see
        :func:`~iwsft.policies.token_log_prob.token_log_prob_and_entropy`.

        Raises:
            KeyError: An input key is missing.
            ValueError: The model can't read the trajectories. With gradients: it has a loss of its
                own, such as that of a mixture's routers.
            NotImplementedError: The model changes its logits in an unknown way.
        """
        decoder = check_decoder(self.model)
        if torch.is_grad_enabled():
            check_own_loss(decoder)
        tokens = _Tokens.of(trajectories)
        number, width = _check_tokens(tokens, decoder)
        rounded = -(-width // _MULTIPLE) * _MULTIPLE
        # A decoder may have a table of positions, or read longer rows otherwise.
        limits = (context_of(decoder.config), switch_of(decoder.config))
        width = min([rounded, *(limit for limit in limits if limit and limit >= width)])
        one_row = self.one_row
        if one_row is None:
            one_row = fits_one_row(decoder) and varies_lengths(decoder)
        if one_row:
            place, shape = torch.arange(len(tokens.ids), device=tokens.ids.device), (1, -1)
        else:
            place, shape = tokens.trajectory * width + tokens.position, (number, width)
        ids = tokens.ids.new_zeros(len(tokens.ids) if one_row else number * width)
        ids = ids.index_copy(0, place, tokens.ids).reshape(shape)
        chosen = (tokens.assistant & (tokens.position > 0)).nonzero().squeeze(1)
        inputs: dict[str, Any] = {"input_ids": ids}
        accepted = inspect.signature(type(decoder).forward).parameters
        # With a key-value cache transformers would not recognise packed rows.
        if "use_cache" in accepted:
            inputs["use_cache"] = False
        if one_row:
            inputs["position_ids"] = tokens.position.unsqueeze(0)
        answers = self._ask(decoder, inputs, place[chosen - 1], tokens.ids[chosen], top_k)

        def placed(of_token: Tensor) -> Tensor:
            out = of_token.new_zeros(tokens.layout.numel())
            return out.index_copy(0, tokens.source[chosen], of_token).reshape(tokens.layout)

        return placed(answers[0]), placed(answers[1])

    def predicted(self, trajectories: TensorDictBase) -> Tensor:
        """Tokens with a token before them, bool in the layout: a first one has no log-prob."""
        mask = trajectories.get(ATTENTION_MASK, default=None)
        if mask is None:
            mask = torch.ones_like(_entry(trajectories, TOKENS), dtype=torch.bool)
        segments = Segments.of(trajectories, mask=mask)
        valid = segments.valid.reshape(-1)
        place = torch.arange(len(valid), device=valid.device)
        first = place.new_full((segments.slots,), len(place))
        first.scatter_reduce_(0, segments.index, torch.where(valid, place, len(place)), "amin")
        return (valid & (place > first[segments.index])).reshape(segments.shape)

    def check(self, trajectories: TensorDictBase) -> None:
        """Refuse trajectories that the model can't read, as :meth:`log_prob` would."""
        _check_tokens(_Tokens.of(trajectories), check_decoder(self.model))

    @contextmanager
    def reference(self) -> Iterator[None]:
        """PEFT: within, log-probs are those of the model without its adapters, pi_ref.

        ``requires_grad`` of all parameters is restored at the end. A model without adapters is a
        TypeError.
        """
        peft = peft_model(self.model)
        required = [(parameter, parameter.requires_grad) for parameter in peft.parameters()]
        self.adapters_off = True
        try:
            with peft.disable_adapter():
                yield
        finally:
            self.adapters_off = False
            for parameter, requires in required:
                parameter.requires_grad_(requires)

    def _ask(
        self, decoder: Any, inputs: dict[str, Any], index: Tensor, target: Tensor, top_k: int
    ) -> tuple[Tensor, Tensor]:
        """Run the model; log p of ``target``, and entropy, from the states at ``index``."""
        transform = LogitTransform.of(decoder)
        question = _Question(index, target, inputs["input_ids"].numel(), transform, top_k)
        heads = [m for m in decoder.get_output_embeddings().modules() if isinstance(m, nn.Linear)]
        # The output layer answers the question while the model runs.
        with replaced_forward(heads, question.forward), onednn_layers(self.model):
            logits = self.model(**inputs).logits
        if question.answer is None or question.entropy is None:
            raise NotImplementedError(f"{type(decoder).__name__} did not use its output layer")
        if not self._after_head_checked and len(target) > 0:
            transform.check(question.answer, logits, type(decoder).__name__)
            self._after_head_checked = True
        if logits is question.answer:
            return question.answer, question.entropy
        # The model has scaled, capped or cast its output like logits, so it is not used. But hooks
        # of engines wait for its gradient, and with this they run before the output layer's
        # backward.
        return question.answer + 0.0 * logits.to(question.answer.dtype), question.entropy


class _Tokens(NamedTuple):
    """The tokens that the attention mask leaves in, back to back, ``[n]`` each."""

    ids: Tensor
    assistant: Tensor
    # Number of the token's trajectory, and its position there, both from 0.
    trajectory: Tensor
    position: Tensor
    # Place in the batch read row by row.
    source: Tensor
    layout: torch.Size

    @classmethod
    def of(cls, batch: TensorDictBase) -> _Tokens:
        ids = _entry(batch, TOKENS)
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"{TOKENS!r} must hold integers, it holds {ids.dtype}")
        attention = batch.get(ATTENTION_MASK, default=None)
        if attention is None and ids.ndim > 1:
            _entry(batch, ATTENTION_MASK)
        mask = torch.ones_like(ids, dtype=torch.bool) if attention is None else attention
        segments = Segments.of(batch, mask=mask)
        ids = fit(ids, segments.shape, repr(TOKENS))
        assistant = fit(_entry(batch, ASSISTANT_MASK), segments.shape, repr(ASSISTANT_MASK))
        source = segments.valid.reshape(-1).nonzero().squeeze(1)
        if len(source) == 0:
            raise ValueError(f"{ATTENTION_MASK!r} leaves no token in this batch")
        slot = segments.index[source]
        start = torch.ones_like(slot, dtype=torch.bool)
        start[1:] = slot[1:] != slot[:-1]
        here = torch.arange(len(slot), device=slot.device)
        return cls(
            ids=ids.reshape(-1)[source].long(),
            assistant=assistant.reshape(-1)[source].bool(),
            trajectory=start.cumsum(0) - 1,
            position=here - torch.where(start, here, 0).cummax(0).values,
            source=source,
            layout=segments.shape,
        )


def _entry(batch: TensorDictBase, key: NestedKey) -> Tensor:
    value = batch.get(key, default=None)
    if value is None:
        raise KeyError(f"a language model needs {key!r}, which is not in the batch")
    return value


def _check_tokens(tokens: _Tokens, decoder: Any) -> tuple[int, int]:
    """Number of trajectories and length of the longest; refuse what the model can't read."""
    # Read at once, since reading waits for an accelerator.
    values = (tokens.ids.amin(), tokens.ids.amax(), tokens.position.amax(), tokens.trajectory[-1])
    least, most, last, trajectory = torch.stack(values).tolist()
    config = decoder.config.get_text_config()
    name = type(decoder).__name__
    if least < 0 or most >= config.vocab_size:
        token = f"token {least if least < 0 else most} is outside the vocabulary of {name}"
        way_out = "use the model's tokenizer, or resize its embeddings"
        raise ValueError(f"{token} ({config.vocab_size} tokens); {way_out}")
    limit = context_of(decoder.config)
    if limit is not None and limit <= last:
        problem = f"a trajectory has {last + 1:,} tokens, {name} reads {limit:,}"
        raise ValueError(f"{problem} (its max_position_embeddings); truncate the trajectories")
    check_switch(decoder.config, tokens.trajectory)
    return trajectory + 1, last + 1


@dataclass
class _Question:
    """The output layer computes log p of the targets instead of logits."""

    # States, of the model's rows back to back, that predict the targets.
    index: Tensor
    target: Tensor
    # Number of states that must reach the output layer.
    states: int
    transform: LogitTransform
    top_k: int
    answer: Tensor | None = None
    entropy: Tensor | None = None

    def forward(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        """Replaces the forward of the output layer."""
        if self.answer is not None or hidden.shape[:-1].numel() != self.states:
            others = "prompt-learning and multi-token heads do otherwise"
            raise NotImplementedError(f"the output layer must see every token once; {others}")
        wanted = len(self.target)
        extra = [0, -wanted % _MULTIPLE]
        states = hidden.reshape(-1, hidden.shape[-1])
        log_prob, entropy = token_log_prob_and_entropy(
            states.index_select(0, nn.functional.pad(self.index, extra)),
            head.weight,
            nn.functional.pad(self.target, extra),
            top_k=self.top_k,
            bias=head.bias,
            scale=self.transform.scale,
            softcap=self.transform.softcap,
        )
        # A copy and not a view, because FSDP2 attaches a hook to it.
        self.answer, self.entropy = log_prob[:wanted].clone(), entropy[:wanted]
        return self.answer
