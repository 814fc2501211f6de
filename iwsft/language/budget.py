"""Budget forcing: how long a model thinks before it answers.

Muennighoff et al. 2025, "s1: Simple test-time scaling" (arXiv 2501.19393), section 3.1. Where a
model ends its thinking early, the end is suppressed and "Wait" is appended, up to ``waits`` times.
Where it has used up its budget, the end of thinking is appended and it must answer. This
implementation reads the paper as follows:

- All rounds of thinking share one budget, the appended "Wait"s included.
- A suppressed end does not belong to the thinking and costs nothing.
- A "Wait" is appended only where the budget has room for it and one more token. At least one token
  follows it, as in the authors' evaluation.
- "Final Answer:" follows only a thinking that was cut, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from iwsft.language.generation import Completion, Generator, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ThinkingFormat:
    """How a family of models marks its thinking, as text.

    Attributes:
        start: Text that follows the prompt and opens the thinking.
        ends: Texts of one token each by which the model ends the thinking.
        answer: Text that opens the answer where the model ended its thinking.
        cut: Text that opens the answer where the budget ended the thinking.
        wait: Text that replaces a suppressed end.
    """

    start: str
    ends: tuple[str, ...]
    answer: str
    cut: str
    wait: str = "Wait"

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> Delimiters:
        """Encode the format in a tokenizer's tokens; each end must be a single token."""

        def encoded(text: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=False))

        ends = [encoded(end) for end in self.ends]
        for end, tokens in zip(self.ends, ends, strict=True):
            if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
                way_out = "leave out the think budget, or choose the model's own format"
                problem = f"{end!r}, the end of thinking, is not a token of this model"
                raise ValueError(f"{problem}; {way_out}")
        newline = encoded("\n")
        return Delimiters(
            start=encoded(self.start),
            ends=frozenset(tokens[0] for tokens in ends),
            answer=encoded(self.answer),
            cut=encoded(self.cut),
            wait=encoded(self.wait),
            newline=newline[0] if len(newline) == 1 else None,
        )


@dataclass(frozen=True)
class Delimiters:
    """A :class:`ThinkingFormat` in tokens.

    ``newline`` is the token of a line break, where that is one token. A cut thinking that ends in
    it gets no second one from ``cut``.
    """

    start: tuple[int, ...]
    ends: frozenset[int]
    answer: tuple[int, ...]
    cut: tuple[int, ...]
    wait: tuple[int, ...]
    newline: int | None = None


# The format of s1K and s1K-1.1, which the paper's models are trained on.
S1 = ThinkingFormat(
    start="<|im_start|>think\n",
    ends=("<|im_start|>",),
    answer="<|im_start|>answer\n",
    cut="\n<|im_start|>answer\nFinal Answer:",
)
# DeepSeek-R1, its distilled models, Qwen3, QwQ.
TAGS = ThinkingFormat(
    start="<think>\n",
    ends=("</think>",),
    answer="</think>\n\n",
    cut="\n</think>\n\nFinal Answer:",
)


@dataclass
class Thought:
    """A thinking and its answer, after so many ``waits`` and ``rounds`` of thinking.

    Attributes:
        request: Prompt without the opening of the thinking.
        thinking: Tokens between the delimiters, the appended "Wait"s included.
        cut: Whether the budget ended the thinking.
        tokens: All tokens that follow the prompt, the delimiters included.
    """

    request: Request
    thinking: tuple[int, ...] = ()
    waits: int = 0
    rounds: int = 0
    cut: bool = False
    answer: Completion = Completion((), None)
    tokens: tuple[int, ...] = ()

    def continued(self, tokens: tuple[int, ...]) -> Request:
        """Return the request of the next round, which continues after these tokens."""
        prompt = (*self.request.prompt, *tokens)
        return replace(self.request, prompt=prompt, seed=self.request.seed + self.rounds)


def think_then_answer(
    generator: Generator,
    requests: Sequence[Request],
    *,
    delimiters: Delimiters,
    think_budget: int,
    waits: int = 0,
    stop: frozenset[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[Thought]:
    """Let a model think within a budget and answer; see the module.

    ``requests`` are prompts without the opening of a thinking. Their ``max_tokens`` limits the
    answer, and ``seed + r`` is the seed of the r-th round. The end of the thinking is suppressed
    ``waits`` times at the most. ``stop`` tokens end the answer, and the thinking too.
    """
    complete = partial(generator.generate, temperature=temperature, top_p=top_p)
    thoughts = unfinished = [Thought(request) for request in requests]
    while unfinished:
        rounds = [
            replace(
                thought.continued((*delimiters.start, *thought.thinking)),
                max_tokens=think_budget - len(thought.thinking),
                min_tokens=1 if thought.waits else 0,
            )
            for thought in unfinished
        ]
        completions = complete(rounds, stop=delimiters.ends | stop)
        awaited = []
        for thought, completion in zip(unfinished, completions, strict=True):
            thought.thinking += completion.tokens
            thought.rounds += 1
            thought.cut = completion.stop is None
            room = think_budget - len(thought.thinking) - len(delimiters.wait)
            if not thought.cut and thought.waits < waits and room >= 1:
                thought.thinking += delimiters.wait
                thought.waits += 1
                awaited.append(thought)
        unfinished = awaited
    for thought in thoughts:
        opening = _answer_delimiter(thought, delimiters)
        thought.tokens = (*delimiters.start, *thought.thinking, *opening)
    answers = complete([thought.continued(thought.tokens) for thought in thoughts], stop=stop)
    for thought, thought.answer in zip(thoughts, answers, strict=True):
        thought.tokens += thought.answer.tokens
    return thoughts


def overhead(delimiters: Delimiters) -> int:
    """Return the most tokens that delimiters add to prompt, think budget and answer."""
    return len(delimiters.start) + max(len(delimiters.answer), len(delimiters.cut))


def _answer_delimiter(thought: Thought, delimiters: Delimiters) -> tuple[int, ...]:
    newline = (delimiters.newline,)
    twice = thought.thinking[-1:] == newline == delimiters.cut[:1]
    return delimiters.cut[twice:] if thought.cut else delimiters.answer
