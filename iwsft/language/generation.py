"""Token-level generation: one small interface, through transformers or vLLM.

Prompts and completions are token ids; only the caller knows the tokenizer. The random numbers of a
request depend only on its seed and on the position in its completion. The model's probabilities may
differ in their last bits between batches, so in other batches near-ties may give other tokens (rare
in float32, less rare in bfloat16).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from iwsft.policies.causal_lm_families import context_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Request:
    """A prompt to complete.

    Attributes:
        prompt: Token ids, at least one.
        max_tokens: Most tokens to generate, the stop token included.
        seed: Seed of the sampled tokens.
        min_tokens: Number of first tokens among which no stop token is generated.
    """

    prompt: Sequence[int]
    max_tokens: int
    seed: int = 0
    min_tokens: int = 0


@dataclass(frozen=True)
class Completion:
    """The answer to a request.

    Attributes:
        tokens: Generated tokens, without the stop token.
        stop: Stop token that ended the completion; None where ``max_tokens`` ended it.
    """

    tokens: tuple[int, ...]
    stop: int | None


class Generator(ABC):
    """Completes prompts."""

    @property
    @abstractmethod
    def context(self) -> int | None:
        """Most tokens of prompt and completion together; None for no limit."""

    def generate(
        self,
        requests: Sequence[Request],
        *,
        stop: frozenset[int],
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> list[Completion]:
        """Complete the requests, in their order; several samples of a prompt are several requests.

        Args:
            requests: Prompts.
            stop: Tokens that end a completion; no other token does.
            temperature: Temperature of the softmax that tokens are sampled from; 0 takes the
                likeliest token.
            top_p: Probability mass of the likeliest tokens to sample from (Holtzman et al. 2020).

        A ValueError says that a request exceeds the model's context, or what is out of range.
        """
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature} must be a finite number, at least 0")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} must be a probability mass in (0, 1]")
        for number, request in enumerate(requests):
            new, prompt = request.max_tokens, len(request.prompt)
            if prompt < 1 or new < 1:
                sizes = f"{prompt} tokens of prompt and asks for {new}"
                raise ValueError(f"request {number} has {sizes}")
            if self.context is not None and prompt + new > self.context:
                needs = f"{prompt + new} tokens ({prompt} of its prompt)"
                limit = f"the model takes {self.context}; lower max_tokens"
                raise ValueError(f"request {number} needs {needs}, {limit}")
        return self._complete(requests, stop, temperature, top_p)

    def close(self) -> None:  # noqa: B027
        """End what the engine has started; it generates nothing any more."""

    @abstractmethod
    def _complete(
        self, requests: Sequence[Request], stop: frozenset[int], temperature: float, top_p: float
    ) -> list[Completion]:
        """Complete checked requests."""


class TransformersGenerator(Generator):
    """Generates with a transformers decoder: in batches, padded on the left, with its KV cache.

    The model's own generation settings (temperature, repetition penalty, ...) are not used.
    """

    def __init__(self, model: PreTrainedModel, *, batch_size: int = 8) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self._model = model
        self._batch_size = batch_size

    @property
    def context(self) -> int | None:
        """``max_position_embeddings`` of the model's config; None where it has none."""
        return context_of(self._model.config)

    def _complete(
        self, requests: Sequence[Request], stop: frozenset[int], temperature: float, top_p: float
    ) -> list[Completion]:
        size = self._batch_size
        batches = [requests[at : at + size] for at in range(0, len(requests), size)]
        answers = (self._batch(batch, stop, temperature, top_p) for batch in batches)
        return [*chain.from_iterable(answers)]

    def _batch(
        self, requests: Sequence[Request], stop: frozenset[int], temperature: float, top_p: float
    ) -> list[Completion]:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        device = self._model.device
        longest = max(len(request.prompt) for request in requests)
        tokens = torch.zeros(len(requests), longest, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, request in enumerate(requests):
            tokens[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, longest - len(request.prompt) :] = 1
        choice = _Choice(requests, longest, sorted(stop), temperature, top_p, device)
        settings = GenerationConfig(
            max_new_tokens=max(request.max_tokens for request in requests),
            do_sample=False,
            # Ended rows are filled with pad tokens, which are cut off below.
            eos_token_id=sorted(stop) or None,
            pad_token_id=0,
            use_cache=True,
        )
        # `generate` fills the gaps of a config from the model's own.
        own, training = self._model.generation_config, self._model.training
        self._model.generation_config = GenerationConfig()
        self._model.eval()
        try:
            whole = self._model.generate(  # type: ignore[operator]
                tokens.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([choice]),
                stopping_criteria=StoppingCriteriaList([choice.spent]),
            )
        finally:
            self._model.generation_config = own
            self._model.train(training)
        rows = whole[:, longest:].tolist()
        return [_cut(row, request, stop) for row, request in zip(rows, requests, strict=True)]


class VLLMGenerator(Generator):
    """Generates with vLLM, which batches by itself and promises that a seed fixes the tokens.

    ``dtype`` is torch's name of a number format; ``"auto"`` keeps the format of the files.
    ``parallel`` GPUs share one copy of the model, a folder or hub id. ``revision`` is the branch or
    commit of a hub id. vLLM raises temperatures between 0 and 0.01 to 0.01, with a warning, and
    ``min_tokens`` holds back the model's own end token even where it is not among the stop tokens.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        parallel: int = 1,
        trust_remote_code: bool = False,
    ) -> None:
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ImportError(f"vLLM does not load ({error}); pip install vllm") from error
        if dtype == "auto":
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(
                model, revision=revision, trust_remote_code=trust_remote_code
            )
            # vLLM's own "auto" takes half of the bits of float32.
            if config.get_text_config().dtype == torch.float32:
                dtype = "float32"
        self._settings = SamplingParams
        self._engine = LLM(
            model=model,
            revision=revision,
            tokenizer_revision=revision,
            dtype=dtype,
            tensor_parallel_size=parallel,
            trust_remote_code=trust_remote_code,
        )

    @property
    def context(self) -> int | None:
        """``max_model_len`` of the engine."""
        return int(self._engine.llm_engine.model_config.max_model_len)

    def close(self) -> None:
        """End the engine's process, which has the weights, where it is one of its own."""
        core = getattr(self._engine.llm_engine, "engine_core", None)
        getattr(core, "shutdown", lambda: None)()
        del self._engine

    def _complete(
        self, requests: Sequence[Request], stop: frozenset[int], temperature: float, top_p: float
    ) -> list[Completion]:
        settings = [
            self._settings(
                temperature=temperature,
                top_p=top_p,
                seed=request.seed,
                max_tokens=request.max_tokens,
                min_tokens=request.min_tokens,
                stop_token_ids=sorted(stop),
                # Only the caller's stop tokens end a completion.
                ignore_eos=True,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        outputs = self._engine.generate(prompts, settings, use_tqdm=False)
        return [
            _cut(list(output.outputs[0].token_ids), request, stop)
            for output, request in zip(outputs, requests, strict=True)
        ]


def draw(logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float = 1.0) -> Tensor:
    """Sample a token for each row by inverting the distribution function, likeliest token first.

    Logits are ``[rows, vocabulary]``, ``uniform`` numbers in [0, 1), float64 ``[rows]``, as is the
    result. The temperature is above 0, ``top_p`` in (0, 1].
    """
    probability = (logits.double() / temperature).softmax(-1)
    probability, order = probability.sort(dim=-1, descending=True, stable=True)
    mass = probability.cumsum(-1)
    # A token is allowed where those before it hold less than top_p: the likeliest always is.
    allowed = (mass - probability) < top_p
    total = (probability * allowed).sum(-1, keepdim=True)
    rank = (mass <= uniform[:, None] * total).sum(-1, keepdim=True)
    # The sums may differ from each other in the last bit.
    rank = rank.minimum(allowed.sum(-1, keepdim=True) - 1)
    return order.gather(-1, rank).squeeze(-1)


class _Choice:
    """Chooses the token of each row, as a logits processor of transformers' ``generate``."""

    def __init__(
        self,
        requests: Sequence[Request],
        prompt: int,
        stop: list[int],
        temperature: float,
        top_p: float,
        device: torch.device,
    ) -> None:
        self._prompt = prompt
        self._stop = torch.tensor(stop, dtype=torch.long, device=device)
        self._temperature, self._top_p = temperature, top_p
        self._most = torch.tensor([request.max_tokens for request in requests], device=device)
        self._least = torch.tensor([request.min_tokens for request in requests], device=device)
        self._uniform: Tensor | None = None
        if temperature > 0:
            steps = int(self._most.max())
            seeds = [torch.Generator().manual_seed(request.seed) for request in requests]
            rows = [torch.rand(steps, generator=seed, dtype=torch.float64) for seed in seeds]
            self._uniform = torch.stack(rows).to(device)

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        step = tokens.shape[1] - self._prompt
        too_early = (step < self._least)[:, None]
        scores[:, self._stop] = scores[:, self._stop].masked_fill(too_early, -torch.inf)
        if self._uniform is None:
            return scores
        uniform = self._uniform[:, step].to(scores.device)
        chosen = draw(scores, uniform, temperature=self._temperature, top_p=self._top_p)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)

    def spent(self, tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return which rows have all their tokens, as a stopping criterion."""
        return (tokens.shape[1] - self._prompt) >= self._most


def _cut(tokens: list[int], request: Request, stop: frozenset[int]) -> Completion:
    """Cut a row at its first stop token or at its own length; the rest only fills the batch."""
    tokens = tokens[: request.max_tokens]
    for position, token in enumerate(tokens):
        if token in stop:
            return Completion(tuple(tokens[:position]), token)
    return Completion(tuple(tokens), None)
