"""Records of rows, and how tests write and read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from iwsft.datasets.text.rows import Row

CHAT = {
    "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "vier 😀"}]
}
PAIR = {"prompt": "2+2=", "completion": "4"}


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def contents(rows: list[Row]) -> list[tuple[Any, ...]]:
    return [
        (r.messages, r.prompt, r.completion, r.score, r.weight, r.count, r.correct) for r in rows
    ]


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}
