r"""The final answer in a model's text, and how whole numbers, letters and LaTeX are read.

A text that can be read in two ways (``5 or 7``, ``x = 3, y = 2``, ``12,5``) is neither a whole
number nor a letter, nor is one that may be a part of a value (``5 times``, ``2 thirds``). A point
is a decimal point, and a comma separates thousands: ``1,234`` is 1234, ``1.234`` is not whole.
"""

from __future__ import annotations

import re
import unicodedata

# Where the thinking ends and the answer starts, in the formats of iwsft.language.budget.
_END_OF_THINKING = ("<|im_start|>answer", "</think>")
_SPECIAL = re.compile(r"<\|[^|<>]*\|>|</?s>|<end_of_turn>|<eos>")
# Minus signs, hyphens and quotes, symbols that LaTeX has commands for, characters without width.
_SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("\u201c\u201d\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2018\u2019", "'"),
        **dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\u2066\u2067\u2068\u2069\ufeff"),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"),
        "\u221e": r"\infty ",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u00d7": r"\times ",
        "\u222a": r"\cup ",
    }
)
# Digits that NFKC would add to the number before them: powers, indices, fractions.
_RAISED = re.compile(
    "[\u00b2\u00b3\u00b9\u2070-\u2079]+|([\u2080-\u2089]+)|[\u00bc-\u00be\u2150-\u215e]"
)

_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*(\{)|\s+(-?\d[\d.,]*|[A-D]\b))")
# What stands between the boxes of one answer.
_BETWEEN_BOXES = re.compile(r"(?:[\s,;&$]|\\[()\[\]]|\\text\s*\{\s*(?:and|or)\s*\}|and|or|\w\s*=)*")
_TAGS = re.compile(r"<answer>((?:(?!<answer>).)*)</answer>", re.IGNORECASE | re.DOTALL)
_LINES = (
    re.compile(
        r"\banswer\b(?:\s+choice)?(?:\s*\([^()\n]*\)|\s+(?:to|for|of)\b[^.:=\n]{0,60}?)?\W{0,4}?"
        r"(?:[:=]|\b(?:is|(?:should|would|must)\s+be)\b:?)[ \t*]*(.*)",
        re.IGNORECASE,
    ),
    # A heading: the answer is on the next line.
    re.compile(r"^[ \t#*]*(?:the\s+)?(?:final\s+)?answer[ \t*]*$()", re.IGNORECASE | re.MULTILINE),
    re.compile(r"####(?![ \t]*\d+[.)]\s)(?=[^\w\n]{0,9}\d)[ \t]*(.*)"),
)
# A sentence that states another answer on the same line.
_RESTATED = re.compile(
    r"[.!?]\s+(?=[A-Z][^.!?\n]{0,40}\banswer\s*(?:[:=]|\bis\b)(?!\s*not\b))", re.IGNORECASE
)
_NUMBER_WORDS = (
    *("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen"),
)
_BASE = rf"(\d+|{'|'.join(_NUMBER_WORDS)})(?![A-Za-z])"
_CORRECTION = r"(?:No|Wait|Actually|Hmm+|Oops|Sorry|Correction)\b"
# An explanation after an answer.
_EXPLANATION = re.compile(
    r"(?<=\S)(?:\s*[-,;:.(\u2014]*\s*(?<![A-Za-z])"
    r"(?:and\s+)?(?:because|since|as|so|where|which|not|but|instead|rather|hence|thus|given|due)\b"
    r"|\s*,\s*(?:that\s+is|i\.e|e\.g|assuming|correct)\b|\s*[;\u2014](?=.*[A-Za-z]{2})"
    rf"|[.!?]\s+(?=[A-Z])(?!{_CORRECTION})"
    rf"|\s+\((?!mod|or\b|and\b|(?:in\s+)?base[-\s]*{_BASE})(?=[A-Za-z]{{2,}}[-\s,)])).*",
    re.DOTALL,
)

_WRAPPERS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|color\{\w+\})?|math(?:bf|it|rm|sf|tt)|boldsymbol|bm|mbox|emph|underline"
    r"|operatorname)\s*\{([^{}]*)\}"
)
_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|large|Large|bf|rm|quad|qquad|checkmark|color\{\w+\}|tag\{\w+\})"
    r"(?![A-Za-z])|\\[()\[\]!\\]"
    r"|\\?[%$\u00a3\u20ac]|[*`_]{2}|[*`\u2713\u2705]"
)
_SPACES = re.compile(r"\\[, ;:]|~|\^?\{?\\circ\b\}?|\\degree\b|\u00b0")
_MODULUS = re.compile(r"\s*\(?\s*\\?[pb]?mod(?:ulo)?\s*\d+\s*\)?")
# Words after a number that make it another one.
_MULTIPLES = (
    r"dozens?|hundreds?|thousands?|(?:m|b|tr)illions?|squared|cubed|halves|thirds|fourths|fifths|"
    r"sixths|eighths|tenths|(?:hundred|thousand|million)ths"
)
_SEVERAL = re.compile(
    r"[,;<>\u00b1\u2260]|\\(?:pm|n?eq?|leq?|geq?|lt|gt)\b|\d\s+(?:of|to|out)\b|\b(?:not|or|less|more|"
    r"fewer|greater|than|least|most|between|over|under|up\s+to|almost|nearly|one\s+of|"
    rf"{_MULTIPLES}|"
    r"pi|sqrt|root|factorial|(?<!\\)times|twice|double|triple|half|plus|if|unless|otherwise|wrong|"
    r"incorrect|false|impossible|cannot|fails?)\b|\d\s+minus\b|\bis\s*$",
    re.IGNORECASE,
)
_AFTER_NUMBER = re.compile(rf"\b(?:{_MULTIPLES}|or\s+(?:more|less|fewer|greater|above|below))\b")
_BASE_IN_WORDS = re.compile(
    r"(?<=\d)(?:[_{(\s~]|\\[ ,;!]|\\(?:text|mathrm)\s*\{)*(?:in\s+)?base(?:[-\s~}]|\\[ ,;!])*"
    rf"{_BASE}[\s)}}]*"
)
_INDEX = re.compile(rf"\d[)}}]*\s*_\s*\{{?\s*(?:\\(?:text|mathrm)\s*\{{\s*)?{_BASE}")
_RELATION = r"((?:\\not\s*)?[<>]=?|\\not\s*=|\\(?:neq?|n?[lg]eq?(?:slant)?|[lg]t)(?![a-z]))"
# An operator without what follows it: Math-Verify reads what comes before it.
_OPERATOR = r"([-+^_/=({]|\\(?:cdot|times|div|d?frac|sqrt))"
_BOUND = re.compile(rf"^{_RELATION}|(?:{_RELATION}|{_OPERATOR})$")
_SAME_BOUNDS = {
    **{r"\leq": r"\le", r"\leqslant": r"\le", "<=": r"\le", r"\lt": "<", r"\neq": r"\ne"},
    **{r"\geq": r"\ge", r"\geqslant": r"\ge", ">=": r"\ge", r"\gt": ">"},
}
_DOTS = re.compile(r"\\[lc]?dots(?![a-z])|\.{3}")
# What an answer is for: 33 for n = 7.
_CONDITION = re.compile(r"(?<=[\d\w})])\s+(?:when|for|at|with|using|by|after)\s+[^=\d]*=.*")
_FUNCTIONS = r"(?:log|ln|sin|cos|tan|cot|exp|gcd|lcm|max|min|floor|ceil)\b"
_WORDS = rf"(?:(?!minus|negative|{_FUNCTIONS})[A-Za-z']{{2,}}[.:]?\s+)*"
_UNITS = r"(?:\s+[A-Za-z]{2,}|\s+[mgshlLNJWVAKCF]\b|[ck]m\b|mm\b|[km]g\b|m[lL]\b|mph\b)"
_WHOLE = re.compile(
    rf"{_WORDS}(?:US)?([-+]|minus\s|negative\s)?\s*(\d{{1,99}})(?:\.0*)?"
    rf"(?:{_UNITS}(?:\^?\d)?(?:/[A-Za-z]+(?:\^?\d)?)?)*\s*[.?]?"
)
_LETTER = re.compile(
    r"(?:(?:the|correct|right|best|final|option|choice|letter|answer|is|i|choose)[\s:]+)*"
    r"\(?([A-D])(?:\)|[.:,!](?=\s|$)|\?$"
    r"|(?=\s+[-(\u2192]\s*|\s+is\s+(?!not|wrong|incorrect|false|impossible)\w|$))",
    re.IGNORECASE,
)
_ANY_LETTER = re.compile(r"(?<![A-Za-z])[A-D](?![A-Za-z])", re.IGNORECASE)
_NEXT_LETTER = re.compile(
    r"\W*(?:(?:and|or)\W+)*\(?[A-H]\b(?!\s+(?!and\b|or\b|are\b)\w)"
    r"|(?<=,)\s+(?:[a-z]+\s+){1,2}\(?[A-H]\b\W*$"
)


def after_thinking(text: str) -> str:
    """What follows the thinking, or all of a text whose thinking has not ended."""
    for mark in _END_OF_THINKING:
        text = text.rpartition(mark)[2]
    return text


def extract_answer(text: str, *, letter: bool = False, verbatim: bool = False) -> str | None:
    r"""Extract the final answer from a model's text; None where there is none.

    It is the content of the last ``\boxed{X}``, or of the last boxes with nothing but commas, "and"
    or "or" between them (``X, Y``). Without a box, it is the last of ``Answer: X`` or ``answer is
    X`` (on this line or the next), ``#### X`` and ``<answer>X</answer>``, without an explanation
    after it. Of a ``letter`` it is the last of all these that names one. Thinking counts only where
    it has not ended. ``verbatim`` keeps its characters and what follows it on its line.
    """
    text = after_thinking(text)
    text = _SPECIAL.sub("", text if verbatim else _plain_characters(text))
    text = _TAGS.sub(r"\nAnswer:\1\n", text)
    text = _RESTATED.sub(".\n", text)
    boxes, lines = _boxes(text), []
    for match in (match for pattern in _LINES for match in pattern.finditer(text)):
        following = [match[1], *text[match.end() :].splitlines()]
        line = next((line for line in following if line.strip(" \t*`$[\\")), "")
        if line is not following[0]:
            # On a line of its own, a dash and a space begin an entry of a list.
            line = re.sub(r"^\s*-\s+(?=\S)", "", line)
        line = " ".join(line.split()).strip("* `\"'")
        line = line if verbatim else _EXPLANATION.sub("", line).rstrip(".").strip(" *")
        lines.append((match.start(), line))
    answers = boxes or lines
    if letter:
        answers = [each for each in boxes + lines if _ANY_LETTER.search(each[1])]
    return max(answers)[1] or None if answers else None


def parse_text(answer: str) -> str:
    r"""An answer as plain text: without ``\text{}``, and quotes, asterisks and stops around it."""
    text = " ".join(_WRAPPERS.sub(r"\1", answer).split())
    return text.strip("* `\"'.") or text


def parse_integer(answer: str) -> int | None:
    """Parse a whole number; None for anything else. Units may follow it, other terms may not.

    Of an equation the side that is a number counts: ``3 * 6 = 18`` is 18.
    """
    text = _MODULUS.sub("", _without_layout(write_bases(answer)))
    text = re.sub(r"(?<=\d)[, '](?=\d{3}(?!\d))", "", _EXPLANATION.sub("", text))
    if _SEVERAL.search(text):
        return None
    text = _CONDITION.sub("", text)
    sides = (
        _WHOLE.fullmatch(side.strip(" ()[]\"'")) for side in re.split(r"=|\\approx|\u2248", text)
    )
    numbers = {int(side[2]) * (-1 if (side[1] or "+")[0] in "-mn" else 1) for side in sides if side}
    return numbers.pop() if len(numbers) == 1 else None


def parse_letter(answer: str) -> str | None:
    r"""Parse a choice (``C``, ``(C)``, ``C) text``, ``\text{C}``); None for anything else."""
    text = _EXPLANATION.sub("", _without_layout(answer)).strip(" _'\"[]")
    match = _LETTER.match(text)
    if match is None or _NEXT_LETTER.match(text, match.end()):
        return None
    if re.match(rf"\s*{_CORRECTION}", text[match.end() :]):
        return None
    return match[1].upper()


def write_bases(latex: str) -> str:
    r"""Write bases that are words as indices: ``101 (base 2)`` is ``101_{2}``."""
    return _BASE_IN_WORDS.sub(lambda match: f"_{{{match[1]}}}", latex)


def differ_unread(correct: str, answer: str) -> bool:
    r"""Whether answers differ in what Math-Verify does not read.

    It reads ``12_3``, ``\le 12``, ``12\text{ million}``, ``12, \dots`` and ``12^`` as 12. An answer
    without a base may be in that of the right one, which the question names.
    """
    bases = _bases(answer)
    if bases and bases != (_bases(correct) or {10}):
        return True
    return _unread(correct) != _unread(answer)


def _bases(latex: str) -> set[int]:
    words = {word: number for number, word in enumerate(_NUMBER_WORDS, 2)}
    found = _INDEX.findall(latex)
    return {words[base] if base in words else int(base) for base in found}


def _unread(latex: str) -> set[str]:
    text = latex.strip(" .$").lower()
    bounds = [match[1] or match[2] for match in _BOUND.finditer(text)]
    bounds = [_SAME_BOUNDS.get(bound, bound) for bound in bounds]
    words = {word for part in _WRAPPERS.findall(text) for word in _AFTER_NUMBER.findall(part)}
    return {*bounds, *words, *("dots" for _ in _DOTS.finditer(text))}


def normalize_latex(latex: str) -> str:
    """Remove from LaTeX what does not change its meaning, so that more equal answers match."""
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[!,;: ]|\\?\$|~", "", latex)
    text = re.sub(r"_\{(\w+)\}", r"_\1", re.sub(r"\\[dt]frac", r"\\frac", text))
    return "".join(text.split()).rstrip(".")


def separate_lines(latex: str) -> str:
    """Separate numbers on two lines; in an environment, such as a matrix, they are one value."""
    return latex if r"\begin" in latex else re.sub(r"(?<=\d)\s*\\\\\s*(?=[-\d(])", "; ", latex)


def _plain_characters(text: str) -> str:
    """Digits, letters, signs and spaces as in ASCII; powers, roots and fractions as in LaTeX."""

    def latex(match: re.Match[str]) -> str:
        plain = unicodedata.normalize("NFKC", match[0])
        if "\u2044" in plain:
            return r"\frac{" + plain.replace("\u2044", "}{") + "}"
        return f"{'_' if match[1] else '^'}{{{plain}}}"

    text = unicodedata.normalize("NFKC", _RAISED.sub(latex, text.translate(_SYMBOLS)))
    return re.sub(r"\u221a\s*(?:\(([^()]*)\)|(\w+))", r"\\sqrt{\1\2}", text)


def _without_layout(answer: str) -> str:
    """Take the commands and braces of LaTeX away that only change how an answer looks."""
    text = _SPACES.sub(" ", " ".join(_plain_characters(separate_lines(answer)).split()))
    # Between numbers an asterisk multiplies.
    text = re.sub(r"(?<=\d)\s*\*{1,2}\s*(?=[\d(])", r"\\cdot ", text)
    text, before = re.sub(r"\\[{}]", "", text), ""
    while text != before:
        before, text = text, _WRAPPERS.sub(r"\1", text)
    return re.sub(r"[{}]", "", _LAYOUT.sub("", text.replace("{,}", ","))).strip()


def _boxes(text: str) -> list[tuple[int, str]]:
    """The contents of the boxes that are closed, neighbours together, with their places."""
    opened: list[int] = []
    closed: dict[int, int] = {}
    for brace in re.finditer(r"\\[\\{}]|[{}]", text):
        if brace[0] == "{":
            opened.append(brace.end())
        elif brace[0] == "}" and opened:
            closed[opened.pop()] = brace.end()
    boxes: list[tuple[int, list[str]]] = []
    end = 0
    for box in _BOX.finditer(text):
        after = box.end() if box[2] else closed.get(box.end(), 0)
        # Boxes in boxes are only braces.
        content = box[2] or _BOX.sub("{", text[box.end() : max(after - 1, 0)]).strip()
        if box.start() < end or not content:
            continue
        if not boxes or not _BETWEEN_BOXES.fullmatch(text, end, box.start()):
            boxes.append((box.start(), []))
        if content not in boxes[-1][1]:
            boxes[-1][1].append(content)
        end = after
    return [(start, ", ".join(contents)) for start, contents in boxes]
