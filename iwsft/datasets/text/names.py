"""Names and values of columns in the forms in which they are compared."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from functools import lru_cache
from typing import Any


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
