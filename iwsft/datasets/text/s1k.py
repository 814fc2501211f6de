"""The paper's language data, s1K-1.1: rows of a question, a trace of thought and an answer.

    rows = read("simplescaling/s1K-1.1", make=s1k.to_row)

The assistant's text is ``<|im_start|>think\\n{trace}\\n<|im_start|>answer\\n{answer}``. An answer
without ``Answer:`` gets it as a prefix (s1, Muennighoff et al. 2025). The columns may be those of
s1K (``thinking_trajectories``, a list, and ``attempt``) or of s1K-1.1
(``deepseek_thinking_trajectory``, ``deepseek_attempt``, and the same with ``gemini``).
"""

from __future__ import annotations

from typing import Any, Literal

from iwsft.datasets.text.rows import ASSISTANT, Row, check_text
from iwsft.datasets.text.sources import Record, row_named

PAD_TOKEN = "<|fim_pad|>"
THINK = "<|im_start|>think\n"
ANSWER = "<|im_start|>answer\n"
_ANSWER_WORD = "Answer:"
_GRADES = {None: None, "yes": True, "no": False}

Teacher = Literal["deepseek", "gemini"]


def to_row(record: Record, where: str, *, teacher: Teacher = "deepseek") -> Row:
    """Make a conversation of one question and its answer from a record of s1K or s1K-1.1.

    ``teacher`` is the one whose trace in s1K-1.1 is used. ``correct`` is its grade (Yes or No).

    Raises:
        ValueError: A column is missing or empty, or a grade is neither Yes nor No.
    """
    with row_named(where):
        trace_column, answer_column = f"{teacher}_thinking_trajectory", f"{teacher}_attempt"
        trace = record.get(trace_column)
        if trace_column not in record:
            trace_column, answer_column = "thinking_trajectories", "attempt"
            traces = record.get(trace_column)
            trace = traces[0] if isinstance(traces, list) and traces else None
        if trace_column not in record:
            names = f"{teacher}_thinking_trajectory (s1K-1.1) nor thinking_trajectories (s1K)"
            raise ValueError(f"neither {names} is a column, only {', '.join(map(str, record))}")
        question = check_text(record.get("question"), "question", filled=True)
        trace = check_text(trace, trace_column, filled=True)
        answer = check_text(record.get(answer_column), answer_column, filled=True)
        grade = record.get(f"{teacher}_grade")
        answered = None if grade is None else str(grade).strip().lower()
        if answered not in _GRADES:
            raise ValueError(f"the grade is {grade!r}, neither Yes nor No")
    if _ANSWER_WORD not in answer:
        answer = f"{_ANSWER_WORD} {answer}"
    messages = (
        {"role": "user", "content": question},
        {"role": ASSISTANT, "content": f"{THINK}{trace}\n{ANSWER}{answer}"},
    )
    return Row(where, messages, correct=_GRADES[answered])


def set_pad_token(tokenizer: Any) -> int:
    """Pad with Qwen2.5's ``<|fim_pad|>``, which no text contains, never with EOS; return its id."""
    if PAD_TOKEN not in tokenizer.get_vocab():
        raise ValueError(f"there is no {PAD_TOKEN}: take the tokenizer of a Qwen2.5 model")
    tokenizer.pad_token = PAD_TOKEN
    return tokenizer.pad_token_id
