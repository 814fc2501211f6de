"""The chat recipe: any causal language model on anybody's rows, tested on rows that are held out.

Recipes with a model and data of their own build on it; see ``gsm8k`` and ``s1k``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from benchmarks.llm.recipes import OWN, Evaluation, Prepared, Recipe, Sources
from benchmarks.llm.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from iwsft.datasets.text.rows import Row

# Keys of a message that tell two conversations apart.
_OF_TEXT = ("role", "content", "tool_calls")
# Rows of one prompt.
Group: TypeAlias = "list[Row]"


@dataclass(frozen=True)
class ChatRecipe(Recipe):
    """Rows with messages, or prompt and completion; a prompt is trained on or held out as a whole.

    The test generates nothing: it compares log-probs of held-out answers before and after. Answers
    that a checker refused do not count in it, but are compared with the right ones.

    Attributes:
        share: Share of the prompts that are held out; None tests on rows of the training.
        tested: Prompts that the test reads at the most.
    """

    defaults: Settings = Settings(
        learning_rate=1e-5, batch_size=8, epochs=3, max_length=4096, self_normalize=True
    )
    algos: tuple[str, ...] = ("base", "iw-sft")
    needs: tuple[str, ...] = ("model", "data")
    holds_out: bool = True
    compares: bool = True
    model: str = ""
    data: str = ""
    share: float | None = 0.1
    tested: int = 512

    def read(self, source: str) -> list[Row]:
        """Read the rows of a file, a folder or a dataset, see :func:`read_rows`."""
        return read_rows(source)

    def testable(self, group: Group) -> bool:
        """Whether the rows of a prompt can be tested on."""
        return any(row.correct is not False for row in group)

    def prepare(self, folder: Path, sources: Sources = OWN, *, seed: int) -> Prepared:
        """See :meth:`Recipe.prepare`; nothing is drawn, so all seeds have the same rows."""
        del seed
        from benchmarks.llm.models import locate

        place = locate(sources.model or self.model, folder)
        rows, share = self.read(sources.data or self.data), sources.eval_share or self.share
        groups: list[Group] | None = None
        if sources.eval_data is not None:
            held_out = self.read(sources.eval_data)
            check_apart(rows, held_out)
            groups = sorted(filter(self.testable, by_prompt(held_out)), key=_digest)
            if not groups:
                name = sources.eval_data
                raise ValueError(f"no row of {name} can be tested on (rows: {len(held_out)})")
        elif share is not None:
            rows, groups = self.split(rows, share)
        tested = by_prompt(rows) if groups is None else groups
        notes: dict[str, Any] = {"prompts": len(by_prompt(rows)), "rows": len(rows)}
        graded = [row.correct for row in rows if row.correct is not None]
        if graded:
            notes["right"] = sum(graded) / len(graded)
        if groups is not None:
            notes["held_out"] = len(groups)
        notes["tested"] = min(len(tested), self.tested)
        return Prepared(
            model=place,
            rows=rows,
            score_name=f"token probability, {'held-out' if groups else 'training'} rows",
            notes=notes,
            held_out=tested[: self.tested],
        )

    def split(self, rows: Sequence[Row], share: float) -> tuple[list[Row], list[Group]]:
        """Split rows into those of training and, by prompt, those that are held out.

        Choice and order depend only on the texts, so no seed moves a prompt from one to the other.
        """
        groups = by_prompt(rows)
        candidates = sorted(filter(self.testable, groups), key=_digest)
        held_out = candidates[: round(share * len(candidates))]
        chosen = {id(group) for group in held_out}
        training = [row for group in groups if id(group) not in chosen for row in group]
        good = sum(row.correct is not False for row in training)
        if training and not good and not held_out:
            wrong = f"all rows are wrong ('correct': false; rows: {len(rows)})"
            raise ValueError(f"{wrong}; add right ones")
        if not held_out or not good:
            wrong = f", {len(training) - good} wrong ones aside" if len(training) > good else ""
            raise ValueError(
                f"an --eval-share of {share:g} leaves {len(held_out)} of {len(candidates)} prompts "
                f"to test on, and {good} rows to train on{wrong}; pass another share, more data, "
                "or --eval-data"
            )
        return training, held_out

    def tested_rows(self, prepared: Prepared) -> list[Row]:
        """See :meth:`Recipe.tested_rows`."""
        return [row for group in prepared.held_out for row in group]

    def evaluate(self, model: Any, tokenizer: Any, prepared: Prepared, *, seed: int) -> Evaluation:
        """Measure how likely the answers of each prompt are, wrong ones left out.

        ``log_probs`` has for each prompt the mean over its answers of the mean log p of a token, in
        nats; ``log_prob`` is their mean, and ``score`` its exp. The figures of
        :func:`right_against_wrong` have the prefix ``right_wrong_``.
        """
        import numpy as np

        from benchmarks.statistics import t_interval

        groups = self.log_probs(model, tokenizer, prepared)
        good = [
            each[[row.correct is not False for row in group]].mean()
            for group, each in groups
            if self.testable(group)
        ]
        low, high = t_interval(good, high=0.0)
        log_prob = float(np.mean(good))
        return {
            "score": math.exp(log_prob),
            "interval": (math.exp(low), math.exp(high)),
            "n": len(good),
            "log_prob": log_prob,
            "log_prob_interval": (float(low), float(high)) if len(good) > 1 else None,
            "log_probs": [*map(float, good)],
            **{f"right_wrong_{key}": x for key, x in right_against_wrong(groups).items()},
        }

    def log_probs(
        self, model: Any, tokenizer: Any, prepared: Prepared
    ) -> list[tuple[Group, NDArray[np.float64]]]:
        """The held-out rows by prompt, with the mean log p of a token of each row."""
        import numpy as np

        from benchmarks.llm.models import mean_log_probs

        means = mean_log_probs(
            model, tokenizer, self.tested_rows(prepared), max_length=prepared.max_length
        )
        ends = np.cumsum([len(group) for group in prepared.held_out])
        return list(zip(prepared.held_out, np.split(means, ends[:-1]), strict=True))


def read_rows(source: str) -> list[Row]:
    """Read rows from ``NAME``, or ``NAME:SPLIT`` or ``NAME:SPLIT:CONFIG``, see ``rows.read``."""
    from iwsft.datasets.text.rows import read

    name, split, config = split_source(source)
    return read(name, split=split, config=config)


def split_source(source: str) -> tuple[str, str | None, str | None]:
    """Split the name of data into itself, a split and a configuration, None where it has none."""
    # A split may be a slice, such as train[:1000].
    name, *parts = re.split(r":(?![^\[]*\])", source)
    if not parts or Path(source).expanduser().exists():
        return source, None, None
    if len(parts) > 2:
        raise ValueError(f"{source}: a dataset is NAME, NAME:SPLIT or NAME:SPLIT:CONFIG")
    split, config = (*parts, None)[:2]
    return name, split or None, config


def by_prompt(rows: Iterable[Row]) -> list[Group]:
    """Gather rows by prompt, in the order of first sight; white space does not tell two apart.

    That of a conversation is what comes before its first answer, else the text of the whole row.
    """
    groups: dict[str, Group] = {}
    for row in rows:
        groups.setdefault(_key(row), []).append(row)
    return list(groups.values())


def right_against_wrong(groups: Iterable[tuple[Group, NDArray[np.float64]]]) -> Evaluation:
    """How much more likely right answers are than wrong ones, prompt by prompt.

    ``groups`` are rows with their mean log-probs of a token; prompts without both right and wrong
    rows are left out, and without any the result is empty. ``score`` is the probability that the
    right one of a right and a wrong answer to a prompt has the higher log-prob per token (AUC
    within the prompt, 1/2 for equal ones), mean over prompts. ``right_likelier`` is the share of
    prompts where the mean of the right ones is higher; ``margin`` is right minus wrong in nats per
    token, mean over prompts. ``of_prompts`` has score and margin of each prompt, in their order,
    to compare models on the same prompts.
    """
    import numpy as np

    from benchmarks.statistics import interval_over_questions, t_interval

    wins, means, most = [], [], 0
    for group, log_probs in groups:
        right = np.array([row.correct is True for row in group])
        wrong = np.array([row.correct is False for row in group])
        if right.any() and wrong.any():
            ahead = log_probs[right][:, None] - log_probs[wrong][None, :]
            wins.append(((ahead > 0) + (ahead == 0) / 2).mean())
            means.append((log_probs[right].mean(), log_probs[wrong].mean()))
            most = max(most, len(group))
    if not wins:
        return {}
    good, bad = np.array(means).T
    margins = good - bad
    return {
        "score": float(np.mean(wins)),
        "interval": interval_over_questions(wins, most),
        "n": len(wins),
        "right_likelier": float(((margins > 0) + (margins == 0) / 2).mean()),
        "margin": float(margins.mean()),
        "margin_interval": t_interval(margins) if len(wins) > 1 else None,
        "right_log_prob": float(good.mean()),
        "wrong_log_prob": float(bad.mean()),
        "of_prompts": {"score": [*map(float, wins)], "margin": margins.tolist()},
    }


def _digest(group: Group) -> bytes:
    return min(map(prompt_digest, group))


def prompt_digest(row: Row) -> bytes:
    """A digest of a row's prompt, by which splits choose: they depend on nothing else."""
    return hashlib.sha256(_prompt(row).encode()).digest()


def _key(row: Row) -> str:
    if row.messages is None and row.prompt.strip():
        # It is the same question in a conversation.
        return asked([{"role": "user", "content": row.prompt}])
    return _squeezed(_prompt(row))


def asked(messages: Iterable[Any]) -> str:
    """What messages say: neither white space nor their ids, weights and names change it."""
    return _squeezed(_joined(messages))


def _squeezed(text: str) -> str:
    """A text without what white space, which JSON escapes, adds to it."""
    return re.sub(r'\s*"\s*', '"', re.sub(r"(\\[nrt]|\s)+", " ", text))


def _prompt(row: Row) -> str:
    from iwsft.datasets.text.rows import ASSISTANT

    if row.messages is None:
        prompt = row.prompt
    else:
        roles = [message["role"] for message in row.messages]
        before = row.messages[: roles.index(ASSISTANT)]
        # A system message alone says nothing of the row.
        has_question = any(message["role"] == "user" for message in before)
        prompt = _joined(before) if has_question else ""
    return " ".join(prompt.split()) or _text(row)


def _text(row: Row) -> str:
    whole = row.prompt + (row.completion or "") if row.messages is None else _joined(row.messages)
    return " ".join(whole.split())


def _joined(messages: Iterable[Any]) -> str:
    # Other keys, such as ids, weights and names, do not make another conversation.
    texts = [{name: m[name] for name in _OF_TEXT if name in m} for m in messages]
    return json.dumps(texts, sort_keys=True, default=str)


def check_apart(
    training: Iterable[Any],
    held_out: Iterable[Any],
    *,
    option: str = "data",
    key: Callable[[Any], str] = _key,
) -> None:
    """Check that no prompt, told by ``key``, is both in training and held out by --eval-OPTION."""
    places = {key(row): row.where for row in training}
    twins = [(row.where, places[key(row)]) for row in held_out if key(row) in places]
    if twins:
        where, twin = twins[0]
        raise ValueError(
            f"--eval-{option} has prompts of --{option} (rows: {len(twins)}; {where} has that of "
            f"{twin}); drop them from one of the two"
        )


RECIPE = ChatRecipe()
