"""The final answer in a model's text: a box, a line, a whole number, a letter, LaTeX."""

from __future__ import annotations

import re

# Where the thinking ends and the answer starts, in the formats of iwsft.language.budget.
_END_OF_THINKING = ("<|im_start|>answer", "</think>")
_ANSWER = re.compile(r"\banswer\b\W{0,4}?(?::|\bis\b:?)[ \t*]*(.*)", re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*(.*)")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_SPECIAL = re.compile(r"<\|[^|<>]*\|>|</s>|<s>")
_NUMBER = re.compile(r"(?<![\w.])[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_UNITS = re.compile(r"\\(?:text|mathrm|mbox|textbf)\s*\{[^{}]*\}|\^\s*\{?\\circ\}?|\\?[%$]")
_LETTER = re.compile(r"(?:(?:option|choice)\s+)?\(?([A-D])(?:\)|[.:,](?=\s|$)|$)", re.IGNORECASE)


def extract_answer(text: str) -> str | None:
    """Extract the final answer from a model's text; None where there is none.

    It is the content of the last ``\\boxed{X}``. Without a box, it is the last of ``Answer: X``
    (``answer is X``; to the end of the line, or the next line) and ``#### X``. The thinking counts
    only where no answer follows it.
    """
    for mark in _END_OF_THINKING:
        text = text.rpartition(mark)[2]
    text = _SPECIAL.sub("", text)
    box = _last_box(text)
    if box is not None:
        return box.strip() or None
    matches = [*_ANSWER.finditer(text), *_HASHES.finditer(text)]
    if not matches:
        return None
    last = max(matches, key=lambda match: match.start())
    lines = [last.group(1), *text[last.end() :].splitlines()]
    line = next((line.strip() for line in lines if line.strip()), "")
    # Without emphasis, quotes and the full stop.
    return line.strip(" \t*`\"'").rstrip(".").strip(" \t*") or None


def parse_integer(answer: str) -> int | None:
    """Parse a whole number; None for anything else. Units may follow it, other terms may not.

    After an equals sign the last side counts: ``3 * 6 = 18`` is 18.
    """
    text = answer.replace("{,}", ",").replace("\\,", "").replace("\\!", "")
    text = _UNITS.sub(" ", text).rpartition("=")[2].strip()
    numbers = list(_NUMBER.finditer(text))
    if len(numbers) != 1 or "\\" in text:
        return None
    # 5x, 5!, 2e3 and 5^n are not 5.
    if re.match(r"[\w^!/*]", text[numbers[0].end() :]):
        return None
    whole, _, decimals = numbers[0].group().replace(",", "").partition(".")
    return None if decimals.strip("0") else int(whole)


def parse_letter(answer: str) -> str | None:
    """Parse a choice (``C``, ``(C)``, ``C) text``, ``\\text{C}``); None for anything else."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", answer)
    match = _LETTER.match(text.strip("$*\\ \t{}[]"))
    return match.group(1).upper() if match else None


def normalize_latex(latex: str) -> str:
    """Remove from LaTeX what does not change its meaning, so that more equal answers match."""
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[!,;: ]|\\?\$|~", "", latex)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    return "".join(text.split()).rstrip(".")


def _last_box(text: str) -> str | None:
    """Return the content of the last box that is closed."""
    for opening in reversed(list(_BOX.finditer(text))):
        depth = 1
        for position in range(opening.end(), len(text)):
            escaped = text[position - 1] == "\\" and text[position - 2] != "\\"
            if text[position] in "{}" and not escaped:
                depth += 1 if text[position] == "{" else -1
            if depth == 0:
                return text[opening.end() : position]
    return None
