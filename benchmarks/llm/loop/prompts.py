"""Prompts of the loop, with what a verifier needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from benchmarks.llm.loop.options import VERIFIERS
from benchmarks.llm.recipes.chat import split_source
from iwsft.datasets.text.rows import check_answer, check_text, untrained
from iwsft.datasets.text.sources import records, row_named
from iwsft.language.generations import Prompter, encode_prompt
from iwsft.language.grading import read_answer

# Columns that a prompt may be in.
_COLUMNS = ("prompt", "messages", "question", "problem")


@dataclass(frozen=True)
class Prompt:
    """A prompt, as text or as messages, with all columns of its row."""

    id: str
    where: str
    content: str | tuple[Mapping[str, Any], ...]
    row: Mapping[str, Any]
    answer: str = ""

    def tokens(self, prompter: Prompter) -> list[int]:
        """The prompt in a model's tokens; without a chat template it is the text as it is."""
        if prompter.tokenizer.chat_template is not None:
            return prompter.chat(self.messages)
        if not isinstance(self.content, str):
            raise ValueError(f"{self.where}: messages need a model with a chat template")
        return encode_prompt(prompter.tokenizer, self.content)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The prompt as a conversation."""
        if isinstance(self.content, str):
            return [{"role": "user", "content": self.content}]
        return [dict(message) for message in self.content]

    def to_row(self, completion: str, *, chat: bool) -> dict[str, Any]:
        """A row to train on, with a completion; ``chat`` tells whether there is a template."""
        if not chat:
            return {"prompt": self.content, "completion": completion}
        # The assistant's turns in the prompt are no answers of the model.
        before = [
            untrained(message) if message.get("role") == "assistant" else message
            for message in self.messages
        ]
        return {"messages": [*before, {"role": "assistant", "content": completion}]}


def read_prompts(
    source: str, verifier: str, *, instruction: str | None = None, limit: int | None = None
) -> list[Prompt]:
    """Read prompts; a named verifier needs an answer of its kind in each row."""
    name, split, config = split_source(source)
    prompts = []
    for number, (where, row) in enumerate(islice(records(name, split, config), limit)):
        with row_named(where):
            content = _content(row, instruction)
            answer = _answer(row, VERIFIERS[verifier]) if verifier in VERIFIERS else ""
        prompts.append(Prompt(str(number), where, content, dict(row), answer))
    if not prompts:
        raise ValueError(f"{source} holds no prompt")
    return prompts


def _content(
    row: Mapping[str, Any], instruction: str | None
) -> str | tuple[Mapping[str, Any], ...]:
    value = next((row[name] for name in _COLUMNS if row.get(name) is not None), None)
    end = f"\n\n{instruction}" if instruction else ""
    if isinstance(value, str):
        return check_text(value, "the prompt", filled=True) + end
    if not isinstance(value, Sequence) or not value or not isinstance(value[-1], Mapping):
        columns = ", ".join(_COLUMNS)
        raise ValueError(f"a prompt is text or messages, in a column {columns}")
    *before, last = value
    if last.get("role") == "assistant":
        raise ValueError("the prompt ends with an assistant's message; drop it")
    text = check_text(last.get("content"), "the prompt", filled=True)
    return (*before, {**last, "content": text + end})


def _answer(row: Mapping[str, Any], kind: Any) -> str:
    """The right answer; a whole number may follow ``####``, as in GSM8K."""
    value = row.get("answer")
    if value is None or not str(value).strip():
        raise ValueError("there is no answer; a verifier that compares needs the column 'answer'")
    answer = check_answer(value)
    if kind == "integer":
        answer = answer.rpartition("####")[2].strip()
    if read_answer(kind, answer) is None:
        whole = "a whole number" if kind == "integer" else "one of the letters A to D"
        raise ValueError(f"the answer is {answer[:60]!r}; --verifier wants {whole}")
    return answer
