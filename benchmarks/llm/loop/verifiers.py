"""Prompts with what a verifier needs, and verifiers: from an answer's text to its score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

from benchmarks.llm.loop.options import VERIFIERS, verifier_of
from benchmarks.llm.recipes.chat import split_source
from benchmarks.runs import versions
from iwsft.datasets.text.rows import check_answer, check_text, untrained
from iwsft.datasets.text.sources import records, row_named
from iwsft.fingerprint import file_sha256, fingerprint
from iwsft.language import grading, verification
from iwsft.language.generations import Prompter, encode_prompt
from iwsft.language.grading import Grader, TimedFunction, read_answer
from iwsft.language.verification import after_thinking, extract_answer

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


class Verdict(NamedTuple):
    """What a verifier says: the score, the final answer, and what went wrong.

    ``score`` is None where the call failed, so that no answer is right without a verdict.
    """

    score: float | None
    answer: str | None
    problem: str | None = None


class Verifier:
    """Scores answers, in a process that is ended where a call hangs.

    ``name`` is that of a verifier that compares with the answer of the prompt, with scores 0 and 1,
    or ``MODULE:FUNCTION``, which gets the text and the row and returns a finite number.
    """

    def __init__(self, name: str, *, seconds: float = 10.0) -> None:
        self._kind: Any = VERIFIERS.get(name)
        self._name = name
        self._grader = Grader(seconds=seconds)
        self._function = None if self._kind else TimedFunction(name, seconds=seconds)

    def start(self) -> None:
        """Load what verifies; an ImportError tells what is missing."""
        if self._function is not None:
            self._function.start()
        elif self._kind == "math":
            self._grader.start()

    @property
    def code(self) -> str:
        """Digest of the code that scores: the user's file, or ours and Math-Verify's version."""
        origin = verifier_of(self._name)
        own = [__file__, grading.__file__, verification.__file__]
        files = [Path(path) for path in (own if self._kind else [origin or ""])]
        digests = {path.name: file_sha256(path) for path in files if path.is_file()}
        return fingerprint({**digests, **(versions(["math-verify"]) if self._kind else {})})[:16]

    def verify(self, prompt: Prompt, text: str) -> Verdict:
        """Score the text of an answer to a prompt."""
        answer = extract_answer(text, letter=self._kind == "letter")
        if self._function is not None:
            score, problem = self._function(text, prompt.row)
            final = " ".join(text.split()) if answer is None else answer
            return Verdict(score, final, problem)
        if self._kind == "text":
            return self._compare_text(prompt.answer, text)
        answer = read_answer(self._kind, answer)
        if answer is None:
            return Verdict(0.0, None)
        right = self._grader.equal(self._kind, prompt.answer, answer)
        problem = self._grader.problems.get((prompt.answer, answer))
        return Verdict(float(right) if problem is None else None, answer, problem)

    def _compare_text(self, correct: str, text: str) -> Verdict:
        """Judge the final answer, with and without an explanation after it, or the whole text."""
        read = extract_answer(text, verbatim=True), extract_answer(text), after_thinking(text)
        answers = [answer for answer in read if answer is not None]
        equal = partial(self._grader.equal, "text", correct)
        right = next(filter(equal, answers), None)
        return Verdict(0.0, answers[0]) if right is None else Verdict(1.0, right)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._grader.close()
        if self._function is not None:
            self._function.close()
