"""Generated rows, chat templates and command lines; trained text is compared with the truth."""

from __future__ import annotations

import json
import resource
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import tyro

from benchmarks.collect.options import Options as CollectOptions
from benchmarks.collect.options import check_options as check_collect
from benchmarks.d4rl.options import EVERY_ALGORITHM, check_options, choose_suite
from benchmarks.d4rl.options import Options as ControlOptions
from benchmarks.llm.options import ALGORITHMS, parse
from benchmarks.llm.settings import Settings
from benchmarks.stopping import ends_in_one_line
from iwsft import datasets
from iwsft.datasets.text.rows import read
from iwsft.datasets.text.tokens import tokenize
from scripts.campaigns.engine import Campaign, Finding
from scripts.campaigns.inputs import refusal
from tests.datasets.text.chat_tokenizers import CHATML, byte_level

WORDS = ("two", "and", " ", "\n", "four", "Answer:", "é", "12", "the", "<b>", "{}", "\\", '"', "🙂")


def _text(random: Random) -> str:
    return "x" + "".join(random.choice(WORDS) for _ in range(random.randrange(8))) + "."


def _conversation(random: Random) -> list[dict[str, Any]]:
    system = [{"role": "system", "content": _text(random)}] if random.random() < 0.3 else []
    turns = [
        {"role": role, "content": _text(random)}
        for _ in range(random.randint(1, 3))
        for role in ("user", "assistant")
    ]
    return system + turns


def _trained(tokenizer: Any, data: Any) -> list[tuple[str, str]]:
    """Of each row the whole text, and the text that is trained on."""
    steps = data.trajectories
    rows = []
    for number in steps["collector", "traj_ids"].unique():
        row = steps[steps["collector", "traj_ids"] == number]
        ids, mask = row["tokens", "full"], row["masks", "all_assistant_mask"]
        rows.append((tokenizer.decode(ids), tokenizer.decode(ids[mask])))
    return rows


# ---- rows


def _row(random: Random) -> tuple[dict[str, Any], str, str]:
    """A row, its whole text, and what of it is trained on."""
    if random.random() < 0.5:
        messages = _conversation(random)
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        trained = [f"{m['content']}<|im_end|>" for m in messages if m["role"] == "assistant"]
        return {"messages": messages}, text, "".join(trained)
    prompt, completion = _text(random), " " + _text(random)
    row = {"prompt": prompt, "completion": completion}
    return row, f"{prompt}{completion}<|im_end|>", f"{completion}<|im_end|>"


def _put(name: str, *values: Any) -> Callable[[dict[str, Any], Random], None]:
    def change(row: dict[str, Any], random: Random) -> None:
        row[name] = random.choice(values)

    return change


def _spoil_message(row: dict[str, Any], random: Random) -> None:
    if "messages" not in row:
        row["messages"] = [{"role": "user", "content": "x"}]
        return
    message = random.choice(row["messages"])
    change = random.choice(["role", "content", "no role", "kind"])
    if change == "role":
        message["role"] = random.choice(["robot", "", None, 3, "Assistant"])
    elif change == "content":
        message["content"] = random.choice([3, ["x"], {"text": "x"}, True, "\ud800"])
    elif change == "no role":
        del message["role"]
    else:
        row["messages"][0] = random.choice([None, 3, "x", []])


def _drop(row: dict[str, Any], random: Random) -> None:
    del row[random.choice([name for name in ("messages", "prompt", "completion") if name in row])]


_WRONG: dict[str, Callable[[dict[str, Any], Random], None]] = {
    "score": _put("score", float("nan"), float("inf"), "0.5", True, [1]),
    "weight": _put("weight", float("nan"), float("-inf"), "2", True, [1]),
    "correct": _put("correct", "yes", 2, 0.5, [True]),
    "messages": _put("messages", "x", 3, [], {}, [[]]),
    "completion": _put("completion", "", "  ", 3, ["x"]),
    "a message": _spoil_message,
    "a missing column": _drop,
}


def _written_as_parquet(rows: list[dict[str, Any]], path: Path) -> bool:
    """Write rows as Parquet where its columns, each of one type, can hold them as they are."""
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
        held = [{k: v for k, v in row.items() if v is not None} for row in table.to_pylist()]
        if json.dumps(held, sort_keys=True) != json.dumps(rows, sort_keys=True):
            return False
        pyarrow.parquet.write_table(table, path)
    except (pyarrow.ArrowException, UnicodeError, TypeError, ValueError):
        path.unlink(missing_ok=True)
        return False
    return True


def _rows_case(_: Path, random: Random, folder: Path) -> Iterator[Finding]:
    made = [_row(random) for _ in range(random.randint(1, 5))]
    rows = [row for row, *_ in made]
    for name, draw in (
        ("score", lambda: random.randrange(9) / 8),
        ("weight", lambda: random.choice([2, 0.5, -1])),
    ):
        if random.random() < 0.4:
            for row in rows:
                row[name] = draw()
    wrong = random.choice([None, *_WRONG]) if random.random() < 0.6 else None
    if wrong is not None:
        # A row takes a completion or messages; the other column is ignored.
        matching = [row for row in rows if wrong != "completion" or "messages" not in row]
        matching = [row for row in matching if wrong != "messages" or "messages" in row]
        if not matching:
            wrong = None
        else:
            _WRONG[wrong](random.choice(matching), random)
    path = folder / random.choice(["rows.jsonl", "rows.json", "array.json", "rows.parquet"])
    if path.suffix != ".parquet" or not _written_as_parquet(rows, path):
        path = path.with_suffix(".jsonl") if path.suffix == ".parquet" else path
        lines = [json.dumps(row, ensure_ascii=random.random() < 0.5) for row in rows]
        array = path.name == "array.json"
        text = "[" + ",\n".join(lines) + "]" if array else "\n".join(lines) + "\n"
        mark = "\ufeff" if random.random() < 0.1 else ""
        path.write_bytes((mark + text).encode("utf-8", "surrogatepass"))
    cut = wrong is None and random.random() < 0.1
    if cut:
        path.write_bytes(path.read_bytes()[: -random.randint(3, 9)])
    yield "tried", ""
    tokenizer = byte_level(CHATML)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = tokenize(read(path), tokenizer)
    except Exception as error:
        yield from refusal(error, [path.name])
        if wrong is None and not cut:
            yield "lost", f"right rows are refused: {error}"
        return
    if wrong is not None or cut:
        yield "silent", f"a wrong {wrong or 'end of the file'} is accepted: {rows}"
        return
    for (whole, trained), (row, true_whole, true_trained) in zip(
        _trained(tokenizer, data), made, strict=True
    ):
        if (whole, trained) != (true_whole, true_trained):
            yield "silent", f"{trained!r} is trained, right: {true_trained!r} of {row}"


# ---- chat templates


@dataclass
class Template:
    """A chat template; ``ends`` are the texts that may follow a trained answer.

    Without a generation prompt the model says the white space before its answer, too.
    """

    text: str
    ends: tuple[str, ...]
    trims: bool
    prompts: bool


_HEADERS = (
    ("<|im_start|>{}\n", "<|im_end|>", "\n"),
    ("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", ""),
    ("<start_of_turn>{}\n", "<end_of_turn>", "\n"),
    ("<|{}|>\n", "<|end|>", "\n"),
    ("{}: ", "</s>", "\n"),
    ("{}: ", "", "\n"),
)


def _template(random: Random) -> Template:
    """Draw a template from the parts of those in use, some of which lose text."""
    header, end, gap = random.choice(_HEADERS)
    before, after = (repr(part) for part in header.split("{}"))
    role = random.choice(["m.role", "('model' if m.role == 'assistant' else m.role)"])
    trims = random.random() < 0.3
    content = "m.content | trim" if trims else "m.content"
    prompt = random.random() < 0.8
    name = "'model'" if "model" in role else "'assistant'"
    head = f"{{{{ {before} + {role} + {after} }}}}"
    body = f"{{{{ {content} + {end + gap!r} }}}}"
    if random.random() < 0.25:
        marked = f"{{% generation %}}{body}{{% endgeneration %}}"
        body = f"{{% if m.role == 'assistant' %}}{marked}{{% else %}}{body}{{% endif %}}"
    turn = head + body
    fault = random.choice(["none", "none", "none", "drops", "refuses", "shortens", "upper", "last"])
    if fault == "drops":
        lost = random.choice(["'system'", "'assistant'"])
        turn = f"{{% if m.role != {lost} %}}{turn}{{% endif %}}"
    elif fault == "refuses":
        raised = "{{ raise_exception('no system') }}"
        turn = f"{{% if m.role == 'system' %}}{raised}{{% endif %}}{turn}"
    elif fault == "shortens":
        turn = turn.replace("m.content", "m.content[:2]")
    elif fault == "upper":
        turn = turn.replace("m.content", "(m.content | upper)")
    elif fault == "last":
        turn = f"{{% if loop.last or m.role != 'assistant' %}}{turn}{{% endif %}}"
    start = random.choice(["", "{{ '<s>' }}"])
    text = f"{start}{{% for m in messages %}}{turn}{{% endfor %}}"
    if prompt:
        text += (
            f"{{% if add_generation_prompt %}}{{{{ {before} + {name} + {after} }}}}{{% endif %}}"
        )
    elif random.random() < 0.3:
        text += "{{ '<|endoftext|>' }}"
    if random.random() < 0.003:
        # One that takes for ever, or all memory.
        inner = random.choice(["", "{{ 'x' * 10 ** 9 }}"])
        loop = "{% for j in range(99999) %}{% endfor %}"
        text += f"{{% for i in range(99999) %}}{inner}{loop}{{% endfor %}}"
    return Template(
        text, ("", end, end + gap, end + "<|endoftext|>", gap, gap + "<|endoftext|>"), trims, prompt
    )


def _templates_case(_: Path, random: Random, folder: Path) -> Iterator[Finding]:
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, resource.RLIM_INFINITY))
    template = _template(random)
    messages = _conversation(random)
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    yield "tried", ""
    tokenizer = byte_level(template.text, eos=random.choice(["<|im_end|>", "</s>", None]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ((whole, trained),) = _trained(tokenizer, tokenize(read(path), tokenizer))
    except Exception as error:
        yield from refusal(error, ["rows.jsonl", "chat template"])
        return
    for message in messages:
        if message["content"].strip() not in whole:
            yield "silent", f"{message} is not in {whole!r} of {template.text!r}"
    rest = trained
    for answer in (m["content"] for m in messages if m["role"] == "assistant"):
        said = answer.strip() if template.trims else answer
        if not template.prompts:
            rest = rest.lstrip()
        ends = [end for end in template.ends if rest.startswith(said + end)]
        if not ends:
            yield "silent", f"{trained!r} is trained of {whole!r} by {template.text!r}"
            return
        rest = rest.removeprefix(said + max(ends, key=len))
    if rest.strip():
        yield "silent", f"{rest!r} is trained beyond the answers by {template.text!r}"


# ---- command lines

_VALUES = (
    "0",
    "1",
    "-1",
    "2",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "0.5",
    "x",
    "",
    "--",
    "-",
    "99999999999999999999",
)
_CONTROL, _COLLECT, _LANGUAGE = (
    [field.name.replace("_", "-") for field in fields(options)]
    for options in (ControlOptions, CollectOptions, Settings)
)
_LANGUAGE += ["recipe", "preset", "algo", "seeds", "jobs", "device", "deepspeed"]
_NAMES = (*EVERY_ALGORITHM, *ALGORITHMS, *datasets.available()[:4], "bc-5", "paper", "cpu", "sac")


def _control_line(words: list[str]) -> None:
    options = tyro.cli(ControlOptions, args=words)
    with ends_in_one_line():
        check_options(options, choose_suite(options))


def _collect_line(words: list[str]) -> None:
    options = tyro.cli(CollectOptions, args=words)
    with ends_in_one_line():
        check_collect(options)


def _language_line(words: list[str]) -> None:
    with ends_in_one_line():
        parse(words)


_LINES: tuple[tuple[list[str], Callable[[list[str]], None]], ...] = (
    (_CONTROL, _control_line),
    (_LANGUAGE, _language_line),
    (_COLLECT, _collect_line),
)


def _lines_case(_: Path, random: Random, folder: Path) -> Iterator[Finding]:
    flags, check = random.choice(_LINES)
    words: list[str] = []
    for flag in random.sample(flags, random.randint(1, 4)):
        words.append(f"--{flag}")
        words += random.choices((*_VALUES, *_NAMES), k=random.choice([0, 1, 1, 1, 2]))
    yield "tried", ""
    try:
        check(words)
    except SystemExit as end:
        # A text of ours names the flag or the value; a number is a box of tyro's, which does too.
        said = end.code
        named = [word.lstrip("-").rstrip("s") for word in words]
        if isinstance(said, str) and "--" not in said and not any(n in said for n in named if n):
            yield "obscure", f"{' '.join(words)}: {said[:200]}"
    except Exception as error:
        yield "obscure", f"{' '.join(words)}: {type(error).__name__}: {str(error)[:200]}"


CAMPAIGNS = (
    Campaign("rows", _rows_case),
    Campaign("chat templates", _templates_case),
    Campaign("command lines", _lines_case),
)
