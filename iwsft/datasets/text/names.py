"""What names and values of columns say of their row, beside the columns that are read."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from functools import lru_cache
from typing import Any

# Names by which data says whether a turn or a row is trained on, and the value of those that are.
SWITCHES = {"train": True, "training": True, "loss": True, "masked": False}
_ROW_SWITCHES = {**SWITCHES, "unmask": False, "label": True}
# Other names for the same, and for weights; some are on where they are false.
_SWITCH_NAME = re.compile(
    r"(?!train(ing)?_loss$)"
    r"((is|should|use|do|no|compute|apply|in|token|turn|message|sample|data|loss|train(ing)?)_)?"
    r"(train(ed|able|ing)?|learn(able)?|loss|masks?|masked|(un)?mask(ed)?|weights?|ignored?"
    r"|skip(ped)?|supervised)(_(on|turns?|on_turns?|weights?|masks?))?"
)
# Other names of a verdict, the values that refuse a row, and names that refuse it where true.
_VERDICT_NAME = re.compile(
    r"((is|was|has|answer|all|tests?|final)_?)*(correct(ness)?|pass(ed|es)?|verified|valid"
    r"|accepted|success(ful)?|solved|right|verdict|judge?ment)(_(answer|tests?))?"
)
_REFUSALS = (False, "no", "wrong", "incorrect", "fail", "failed", "rejected")
_WRONG_NAME = re.compile(r"((is|was|has|answer|tests?)_?)*(wrong|(in|not_)correct|failed)")
_OFF_WHERE_TRUE = re.compile(r"(is_)?mask|no_|.*(ignore|skip)")
# How a bad verdict is written.
WRONG = "'correct': false"
# Other names of a row's count.
_REPEATS = ("multiplicity", "repeat", "repeats")


def unquoted(value: Any) -> Any:
    """A number or truth value that a column keeps as text, as that value."""
    if isinstance(value, str):
        with suppress(ValueError):
            return json.loads(value.lower())
    return value


@lru_cache(4096)
def snake_case(name: Any) -> str:
    """A name in the form that names are compared in: isCorrect, is-correct is is_correct."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[\W_]+", "_", str(name)).lower()


def objection(name: str, value: Any) -> str | None:
    """How to write what a column that is not read says against its row; None if it says nothing."""
    lower = snake_case(name)
    # A label may be the text of a class.
    value = value if lower == "label" else unquoted(value)
    if _says_wrong(lower, value):
        return WRONG
    if lower in _REPEATS and value not in (None, 1):
        return "count"
    off = lower in _ROW_SWITCHES and value in (True, False) and value != _ROW_SWITCHES[lower]
    off |= lower == "loss_scale" and value not in (None, 1, [])
    off |= name not in _ROW_SWITCHES and counts_less(name, value)
    way_out = "weight" if "weight" in lower or lower == "loss_scale" else "weight or correct"
    return way_out if off else None


def _says_wrong(name: str, value: Any) -> bool:
    """Whether a column is a verdict, and a bad one."""
    words = value if isinstance(value, list) and value else [value]
    words = [word.lower() if isinstance(word, str) else word for word in words]
    if _WRONG_NAME.fullmatch(name):
        return all(word in (True, "yes") for word in words)
    return _VERDICT_NAME.fullmatch(name) is not None and all(word in _REFUSALS for word in words)


def counts_less(name: str, value: Any) -> bool:
    """Whether a name that is not read may say that its text is left out, or has a weight."""
    lower = snake_case(name)
    if name in {"weight", *SWITCHES} or not _SWITCH_NAME.fullmatch(lower):
        return False
    value = unquoted(value)
    if isinstance(value, list):
        return bool(value)
    if "weight" in lower:
        return isinstance(value, int | float) and value != 1
    return value in (True, False) and value == bool(_OFF_WHERE_TRUE.match(lower))
