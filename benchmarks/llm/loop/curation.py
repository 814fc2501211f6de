"""Which answers a round trains on, as rows, and the log-probs of the model that wrote them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache  # type: ignore[import-untyped]

from benchmarks.llm.loop.options import LoopOptions
from benchmarks.llm.loop.prompts import Prompt
from benchmarks.llm.models import base_of, load, merged, with_commit
from benchmarks.llm.options import ALGORITHMS
from iwsft.datasets.text.rows import to_row
from iwsft.datasets.text.tokens import tokenize
from iwsft.language.generations import Generation
from iwsft.policies.causal_lm import CausalLMPolicy
from iwsft.reference import annotate_reference
from iwsft.trajectory import REF_LOG_PROB, lengths


def select_answers(
    options: LoopOptions,
    prompt: Prompt,
    texts: Sequence[Generation],
    scores: Sequence[Generation],
    left_out: Counter[str],
    *,
    chat: bool,
) -> list[dict[str, Any]]:
    """The answers to a prompt that are kept, as rows; the others are counted by their reason."""
    right = [options.is_right(each["score"]) for each in scores]
    for name, dropped in (("all-wrong", not any(right)), ("all-right", all(right))):
        if dropped and name in options.drop:
            left_out[f"{name} prompts"] += 1
            left_out[f"answers to {name} prompts"] += len(texts)
            return []
    seen: set[str] = set()
    taken: Counter[bool] = Counter()
    rows = []
    for text, score, good in zip(texts, scores, right, strict=True):
        reason = None
        if not good and not options.keeps_wrong:
            reason = "wrong answers"
        elif not text["text"].strip() or not text["stopped"]:
            reason = "answers without text or end"
        elif score["score"] is None:
            reason = "answers on which the verifier failed"
        elif options.deduplicate and text["text"] in seen:
            reason = "duplicates"
        elif taken[good] == options.max_per_prompt:
            reason = "answers above --max-per-prompt"
        if reason is not None:
            left_out[reason] += 1
            continue
        seen.add(text["text"])
        taken[good] += 1
        rare = options.quality == "pass-rate"
        quality = 1 - sum(right) / len(right) if rare else score["score"]
        row = prompt.to_row(text["text"], chat=chat)
        rows.append({**row, "score": quality, "correct": good})
    return rows


def trainable(
    rows: list[dict[str, Any]], tokenizer: Any, most: int | None, left_out: Counter[str]
) -> list[dict[str, Any]]:
    """The rows that the tokenizer and the template can write as they are, in ``most`` tokens."""

    def encodes(some: Sequence[dict[str, Any]]) -> bool:
        made = [to_row(row, "") for row in some]
        # Training warns of what is cut.
        with warnings.catch_warnings(action="ignore"):
            try:
                tokenize(made, tokenizer, max_length=most)
            except ValueError:
                return False
        return True

    different = list({repr(row): row for row in rows}.values())
    if not rows or encodes(different):
        return rows
    fitting = [row for row in rows if encodes([row])]
    changed = "answers that the tokenizer or the chat template changes"
    left_out[changed] += len(rows) - len(fitting)
    return fitting


def unusable(
    options: LoopOptions, own: Sequence[Mapping[str, Any]], replayed: Sequence[Mapping[str, Any]]
) -> str | None:
    """Why a round can't be trained on, and the ways out; ``own`` are the rows of it alone."""
    algo, rows = options.algo, [*own, *replayed]
    right = [row for row in rows if row["correct"]]
    if not any(row["correct"] for row in own):
        ways = "easier prompts, a lower --min-score, or another model"
        higher = "try a higher --samples-per-prompt or --max-tokens"
        return f"no prompt has a right answer to train on ({higher}, {ways})"
    if ALGORITHMS[algo].signed and len(right) == len(rows):
        return f"no wrong answer is left, and {algo} learns from both (try another --algo)"
    if options.by_quality and len(right) > 1 and len({row["score"] for row in right}) == 1:
        ways = "try --algo sft or iw-sft, or another --quality"
        return f"all right answers have the same quality, and {algo} learns by it ({ways})"
    return None


def annotate(options: LoopOptions, rows: list[dict[str, Any]], policy: str, tokenizer: Any) -> None:
    """Write the log-probs of the model that wrote the rows into them, by the path of training."""
    settings, device = options.job.settings, options.job.own_device
    code: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    model: Any
    if (base := base_of(policy)) is None:
        model = load(policy, dtype=torch.float32, **code)[0]
    else:
        # A reference has no adapters, but they wrote the rows.
        model = merged(with_commit(*base), policy, **code)[0]
    model.to(device)
    half = settings.precision == "bfloat16"
    data = tokenize(
        [to_row(row, "") for row in rows],
        tokenizer,
        max_length=settings.max_length,
    )
    with torch.autocast(device, torch.bfloat16, enabled=half):
        annotate_reference(CausalLMPolicy(model), data.trajectories, rows=4096)
    del model
    clear_device_cache(garbage_collection=True)
    sizes = lengths(data.trajectories).tolist()
    parts = data.trajectories.get(REF_LOG_PROB).split(sizes)
    for number, (row, part) in enumerate(zip(rows, parts, strict=True)):
        # Nine digits are all of a float32; what is cut off is never read.
        known = [float(f"{value:.9g}") for value in part.tolist()]
        row["ref_log_probs"] = known + [0.0] * data.truncated.get(number, 0)
