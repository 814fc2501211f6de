"""From rows of text to packed trajectories of tokens."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from iwsft.datasets.text.chat import ChatEncoder
from iwsft.datasets.text.encoding import check_tokenizer, encode_completion
from iwsft.datasets.text.rows import ASSISTANT, Row
from iwsft.datasets.text.sources import row_named
from iwsft.trajectory import (
    ASSISTANT_MASK,
    ATTENTION_MASK,
    DATA_WEIGHT,
    GIVEN_REF_LOG_PROB,
    MULTIPLICITY,
    SUCCESS_RATE,
    TOKENS,
    from_steps,
    lengths,
    per_trajectory,
    select,
)
from iwsft.validation import beyond_float32, check_data_weights

SCORE = "score"
CORRECT = "correct"
_MOST_DRAWS = 10_000_000


class TokenDataset(NamedTuple):
    """Tokenised rows.

    Attributes:
        trajectories: Packed trajectories, one per row and in the order of the rows, of batch size
            ``[N]`` tokens: ``("tokens", "full")`` int64, ``("masks", "all_attention_mask" |
            "all_assistant_mask")`` bool, ``("collector", "traj_ids")`` int64 (the row's number).
            Where the rows have them: ``score`` float64, ``correct`` bool and ``multiplicity`` int64
            (the row's count), with the row's value on each of its tokens; ``data_weight``
            float32 (the row's weight times the turn's and the token's, 0 off the mask); and
            ``given_ref_log_prob`` float32, NaN for rows that do not give it.
        truncated: Number of tokens cut off, by number of the row; uncut rows are not in it.
        notes: A sentence on each change.
    """

    trajectories: TensorDict
    truncated: Mapping[int, int]
    notes: tuple[str, ...] = ()


def tokenize(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    template: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> TokenDataset:
    """Tokenise rows and mark the tokens to train on: the assistant's turns, or the completion.

    The first token of a row is never trained on, as nothing predicts it, nor is a turn or token of
    weight 0. A row's ``count`` becomes its multiplicity, so such data counts as curated.
    ``max_length`` cuts a row at its end; warnings and ``truncated`` report the cuts.

    Args:
        rows: All rows, see ``iwsft.datasets.text.rows``.
        tokenizer: Fast tokenizer of transformers.
        max_length: Most tokens of a row; None cuts nothing.
        template: Chat template for rows with messages; the tokenizer's own by default.
        template_kwargs: Variables of the template, such as ``enable_thinking`` or ``date_string``.

    Raises:
        ValueError: There are no rows, a row can't be encoded, the part to train on is cut off, or
            only some rows have an optional column; the message names the row.
        TypeError: These are records, which ``read`` makes rows of.
    """
    if not rows:
        raise ValueError("there is no row to tokenise")
    if not isinstance(rows[0], Row):
        kind = type(rows[0]).__name__
        raise TypeError(f"rows are what iwsft.language.read returns, this is of type {kind}")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length} leaves nothing to train on; it is at least 2")
    columns = _columns(rows)
    chat: ChatEncoder | None = None
    if template is not None or any(row.messages is not None for row in rows):
        chat = ChatEncoder(tokenizer, template=template, template_kwargs=template_kwargs)
    else:
        check_tokenizer(tokenizer)
    ids, weights, given, cuts, unknown = zip(
        *(_encode(row, tokenizer, chat, max_length) for row in rows), strict=True
    )
    sizes = torch.tensor([len(row_ids) for row_ids in ids])
    traj_ids = torch.arange(len(rows)).repeat_interleave(sizes)
    weight = torch.cat(weights)
    mask = weight != 0
    steps: dict[NestedKey, Tensor] = {
        TOKENS: torch.cat(ids),
        ATTENTION_MASK: torch.ones_like(mask),
        ASSISTANT_MASK: mask,
        **{key: values.repeat_interleave(sizes) for key, values in columns.items()},
    }
    if DATA_WEIGHT in columns or bool((mask & (weight != 1)).any()):
        weight = weight * steps.get(DATA_WEIGHT, 1.0)
        beyond = beyond_float32(weight).nonzero()
        if len(beyond):
            first = int(beyond[0])
            problem = f"the weight {weight[first]:g} is beyond float32; scale all by one factor"
            raise ValueError(f"{rows[int(traj_ids[first])].where}: {problem}")
        steps[DATA_WEIGHT] = weight.float()
        check_data_weights(steps[DATA_WEIGHT], "the weight of the tokens")
    if any(row.ref_log_probs is not None for row in rows):
        steps[GIVEN_REF_LOG_PROB] = torch.cat(given)
    truncated = {number: cut for number, cut in enumerate(cuts) if cut}
    notes = _notes(rows, tokenizer, chat, unknown)
    if truncated:
        places = ", ".join(rows[number].where for number in list(truncated)[:5])
        of_rows = f"max_length={max_length} cut {len(truncated)} of {len(rows)} rows"
        of_tokens = f"{sum(cuts)} of {len(mask) + sum(cuts)} tokens, ends of turn with them"
        notes.insert(0, f"{of_rows} and {of_tokens}; first: {places}")
    for note in notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    return TokenDataset(from_steps(steps, traj_ids), truncated, tuple(notes))


def correct_only(trajectories: TensorDictBase) -> TensorDictBase:
    """Keep the packed trajectories that a checker accepted, at least one: the paper's D+."""
    correct = _correct(trajectories)
    if not bool(correct.any()):
        raise ValueError(f"no row is correct (rows: {len(correct)}); take other rows")
    return select(trajectories, correct.nonzero().squeeze(-1))


def weigh_correct(
    trajectories: TensorDictBase, *, right: float = 1.0, wrong: float = -1.0
) -> TensorDictBase:
    """Weigh packed trajectories by whether a checker accepted them: ``right``, or ``wrong``.

    None is left out. The weight multiplies their ``data_weight``. ``success_rate`` becomes the
    share of accepted ones among the rows of the same prompt, the tokens before the first that is
    trained, or among all rows where a prompt has one row. The result shares memory with
    ``trajectories``.

    Raises:
        KeyError: There is no ``correct``.
        ValueError: All are right, or all wrong, or a data weight is negative already.
    """
    correct = _correct(trajectories)
    if len(kinds := correct.unique()) == 1:
        kind = "right" if bool(kinds) else "wrong"
        raise ValueError(
            f"all rows are {kind} (rows: {len(correct)}); take right and wrong answers"
        )
    mask = trajectories.get(ASSISTANT_MASK)
    weight = torch.where(trajectories.get(CORRECT), right, wrong) * mask
    given = trajectories.get(DATA_WEIGHT, default=torch.ones_like(weight))
    if bool((given < 0).any()):
        problem = "a row that is right or wrong has a negative weight, which would turn its sign"
        raise ValueError(f"{problem}; write its amount, and 'correct' gives the sign")
    weighed: TensorDictBase = trajectories.copy().set(DATA_WEIGHT, weight * given)
    rate = _success_rates(trajectories, correct)
    return weighed.set(SUCCESS_RATE, rate.repeat_interleave(lengths(trajectories)))


def _correct(trajectories: TensorDictBase) -> Tensor:
    if trajectories.get(CORRECT, default=None) is None:
        raise KeyError(f"there is no {CORRECT!r} here; give the rows a column 'correct'")
    return per_trajectory(trajectories, CORRECT)


def _success_rates(trajectories: TensorDictBase, correct: Tensor) -> Tensor:
    """Share of right rows of each row's prompt, or of all rows, float32 ``[n]``."""
    sizes = lengths(trajectories).tolist()
    tokens, masks = (trajectories.get(key).split(sizes) for key in (TOKENS, ASSISTANT_MASK))
    prompts: dict[tuple[int, ...], list[int]] = {}
    for row, (ids, mask) in enumerate(zip(tokens, masks, strict=True)):
        prompts.setdefault(tuple(ids[: int(mask.int().argmax())].tolist()), []).append(row)
    right = correct.float()
    rates = right.mean().repeat(len(right))
    for rows in prompts.values():
        if len(rows) > 1:
            rates[rows] = right[rows].mean()
    return rates


def _encode(
    row: Row, tokenizer: Any, chat: ChatEncoder | None, max_length: int | None
) -> tuple[Tensor, Tensor, Tensor, int, bool]:
    """Return a row's ids, weights, given log pi_ref, cut-off tokens, and ``Encoded.unknown``.

    The weights do not have that of the whole row in them.
    """
    if (row.messages is None) == (row.completion is None) or (row.messages and row.prompt):
        raise ValueError(f"{row.where}: a row has messages, or a prompt and a completion")
    if row.messages is not None and chat is not None:
        if clashes := chat.variables.intersection(row.unread):
            problem = f"{row.where}: the chat template reads {min(clashes)!r}, as a column is named"
            raise ValueError(f"{problem}; put it into chat_template_kwargs, or rename it")
        encoded = chat.encode(row.messages, row.where, row.template_kwargs)
    with row_named(row.where):
        if row.completion is not None:
            encoded = encode_completion(tokenizer, row.prompt, row.completion)
        weights = _weights_of_tokens(row, encoded.weights)
        if not any(weights[1:]):
            raise ValueError("there is no token to train on; drop the row")
        if not any(weights[1:max_length]):
            first = next(number for number, weight in enumerate(weights) if weight)
            problem = f"max_length={max_length} cuts off all that is trained, from token {first} on"
            way_out = "drop the row, or raise max_length up to the model's context"
            raise ValueError(f"{problem}; {way_out}")
        if row.ref_log_probs is not None:
            _check_length("ref_log_probs", row.ref_log_probs, encoded.ids)
    weight = torch.tensor([0.0, *weights[1:max_length]], dtype=torch.float64)
    ids = torch.tensor(encoded.ids[:max_length])
    given = torch.full_like(weight, math.nan, dtype=torch.float32)
    if row.ref_log_probs is not None:
        given = torch.tensor(row.ref_log_probs[:max_length], dtype=torch.float32)
    return ids, weight, given, len(encoded.ids) - len(ids), encoded.unknown


def _check_length(name: str, given: Sequence[float], tokens: Sequence[object]) -> None:
    if len(given) != len(tokens):
        problem = f"{name} has {len(given)} numbers, and the row {len(tokens)} tokens"
        raise ValueError(f"{problem}; give one for each, those of the template and EOS included")


def _weights_of_tokens(row: Row, weights: list[float]) -> list[float]:
    """Return the weights of a row's turns times its list of weights, where it has one."""
    if not isinstance(row.weight, tuple):
        return weights
    _check_length("weight", row.weight, weights)
    for number, given in enumerate(row.weight):
        if given and not weights[number]:
            problem = f"weight {number} is {given}, and this token is not trained on"
            raise ValueError(f"{problem}; write 0 there")
    return [given * own for given, own in zip(row.weight, weights, strict=True)]


def _ends_early(row: Row, end: str) -> bool:
    """Whether a text to train on has the text of an end token, which it becomes when tokenised."""
    if row.completion is not None:
        # At its end it is not doubled.
        return end in row.completion.removesuffix(end)
    turns = [turn for turn in row.messages or () if turn["role"] == ASSISTANT]
    return any(end in str(turn.get("content")) for turn in turns if turn.get("weight", 1.0))


def _notes(
    rows: Sequence[Row], tokenizer: Any, chat: ChatEncoder | None, unknown: Sequence[bool]
) -> list[str]:
    """Return a sentence on each thing of the tokenizer or the template to know of."""
    notes = []
    ends = {tokenizer.eos_token, chat and chat.turn_end} - {None}
    for end in sorted(ends):
        # A tokenizer may split the text of special tokens.
        if len(tokenizer.encode(end, add_special_tokens=False)) == 1:
            early = [row.where for row in rows if _ends_early(row, end)]
            if early:
                notes.append(
                    f"the text to train on has {end!r} in {len(early)} of {len(rows)} rows, which "
                    "becomes the token that ends an answer; drop it where it is not meant; first: "
                    f"{early[0]}"
                )
    if any(unknown):
        first = next(row.where for row, some in zip(rows, unknown, strict=True) if some)
        notes.append(
            f"the tokenizer does not know characters of the text to train on in {sum(unknown)} of "
            f"{len(rows)} rows, and trains them as unknown or leaves them out; first: {first}"
        )
    if chat is None:
        return notes
    if "strftime_now" in chat.template and not chat.template_kwargs:
        notes.append(
            "the chat template writes today's date into the rows; fix it with template_kwargs, "
            "often {'date_string': '01 Jan 2025'}"
        )
    given = [chat.template_kwargs, *(row.template_kwargs for row in rows)]
    names = {name for each in given for name, value in each.items() if value not in (None, "", [])}
    if unread := sorted(names - chat.variables):
        notes.append(
            f"the chat template does not read {', '.join(unread)} of the template_kwargs; correct "
            "the names, or drop them"
        )
    return notes


def _columns(rows: Sequence[Row]) -> dict[NestedKey, Tensor]:
    """Return the optional columns, with a number per row."""
    columns: dict[NestedKey, Tensor] = {}
    for name, key, dtype in (
        ("score", SCORE, torch.float64),
        ("weight", DATA_WEIGHT, torch.float64),
        ("count", MULTIPLICITY, torch.int64),
        ("correct", CORRECT, torch.bool),
    ):
        values = [getattr(row, name) for row in rows]
        lacking = [row.where for row, value in zip(rows, values, strict=True) if value is None]
        if len(lacking) == len(rows):
            continue
        if lacking:
            problem = f"{lacking[0]}: there is no {name} in {len(lacking)} of {len(rows)} rows"
            raise ValueError(f"{problem}; give all rows a {name}, or none")
        # An epoch has an entry for each draw.
        if name == "count" and not 0 < sum(values) <= max(_MOST_DRAWS, len(rows)):
            problem = f"the rows' counts add up to {sum(values):,}, not to 1 to {_MOST_DRAWS:,}"
            raise ValueError(f"{problem}; divide them by a common factor, or take other rows")
        # A list is of tokens, not of the row.
        values = [1.0 if isinstance(value, tuple) else value for value in values]
        columns[key] = torch.tensor(values, dtype=dtype)
    return columns
