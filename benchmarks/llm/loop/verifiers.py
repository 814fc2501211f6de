"""Verifiers: from an answer's text to its score.

Nothing heavy is imported, so that a verifier that does not load is told at once.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from benchmarks.llm.loop.options import VERIFIERS, verifier_of
from benchmarks.runs import versions
from iwsft.language import grading, verification
from iwsft.language.grading import Grader, TimedFunction, read_answer
from iwsft.language.verification import after_thinking, extract_answer

if TYPE_CHECKING:
    from benchmarks.llm.loop.prompts import Prompt


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
        from iwsft.fingerprint import file_sha256, fingerprint

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
