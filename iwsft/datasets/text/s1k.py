"""The paper's language data, s1K-1.1: a question, a trace of thought and an answer a row.

    rows = read("simplescaling/s1K-1.1", make=s1k.to_row)

The assistant's text is ``<|im_start|>think\\n{trace}\\n<|im_start|>answer\\n{answer}``, with
``Answer: `` in front of an answer that lacks it (s1, Muennighoff et al. 2025). Both kinds of
columns are read: those of s1K (``thinking_trajectories``, a list, and ``attempt``) and those of
s1K-1.1 (``deepseek_thinking_trajectory``, ``deepseek_attempt``, and the same of ``gemini``).
"""

from __future__ import annotations

from typing import Any, Literal

from iwsft.datasets.text.rows import ASSISTANT, Record, Row, checked_text

PAD_TOKEN = "<|fim_pad|>"
THINK = "<|im_start|>think\n"
ANSWER = "<|im_start|>answer\n"
_ANSWER_WORD = "Answer:"
_GRADES = {"yes": True, "no": False}

Teacher = Literal["deepseek", "gemini"]


def to_row(record: Record, where: str, *, teacher: Teacher = "deepseek") -> Row:
    """A row of s1K or s1K-1.1 as a conversation of one question and its answer.

    Args:
        record: columns by name.
        where: its place, for errors.
        teacher: whose trace of s1K-1.1 is taken; s1K holds one only.

    Returns:
        A row with ``messages``; ``correct`` is the grade of s1K-1.1 (Yes or No), where it is given.

    Raises:
        ValueError: missing or empty columns, or a grade that is neither Yes nor No.
    """
    if f"{teacher}_thinking_trajectory" in record:
        trace_column, answer_column = f"{teacher}_thinking_trajectory", f"{teacher}_attempt"
        trace = record[trace_column]
    elif "thinking_trajectories" in record:
        trace_column, answer_column = "thinking_trajectories", "attempt"
        traces = record[trace_column]
        trace = traces[0] if isinstance(traces, list) and traces else None
    else:
        raise ValueError(
            f"{where}: neither {teacher}_thinking_trajectory (s1K-1.1) nor thinking_trajectories "
            f"(s1K) is a column; columns found: {', '.join(map(str, record))}"
        )
    question = _filled(record.get("question"), "question", where)
    trace = _filled(trace, trace_column, where)
    answer = _filled(record.get(answer_column), answer_column, where)
    messages = (
        {"role": "user", "content": question},
        {"role": ASSISTANT, "content": assistant_text(trace, answer)},
    )
    return Row(where, messages, correct=_grade(record.get(f"{teacher}_grade"), where))


def assistant_text(trace: str, answer: str) -> str:
    """What the assistant says, as the model is to write it."""
    if _ANSWER_WORD not in answer:
        answer = f"{_ANSWER_WORD} {answer}"
    return f"{THINK}{trace}\n{ANSWER}{answer}"


def set_pad_token(tokenizer: Any) -> int:
    """Pad with a token that no text holds, never with EOS; returns its id.

    Raises:
        ValueError: a tokenizer without ``<|fim_pad|>``, which is not Qwen2.5's.
    """
    if PAD_TOKEN not in tokenizer.get_vocab():
        raise ValueError(
            f"this tokenizer has no {PAD_TOKEN}, the padding of the s1K recipe; take the tokenizer "
            "of a Qwen2.5 model"
        )
    tokenizer.pad_token = PAD_TOKEN
    pad: int = tokenizer.pad_token_id
    return pad


def _filled(value: Any, column: str, where: str) -> str:
    text = checked_text(value, column, where)
    if not text.strip():
        raise ValueError(f"{where}: {column} is empty; drop the row")
    return text


def _grade(value: Any, where: str) -> bool | None:
    if value is None:
        return None
    grade = _GRADES.get(str(value).strip().lower())
    if grade is None:
        raise ValueError(f"{where}: the grade is {value!r}, neither Yes nor No")
    return grade
