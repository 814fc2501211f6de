"""Token trajectories: layout, columns that feed curation, truncation."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

from iwsft import curate
from iwsft.datasets.text.rows import Row, to_row
from iwsft.datasets.text.tokens import correct_only, tokenize, weigh_correct
from iwsft.trajectory import (
    ASSISTANT_MASK,
    ATTENTION_MASK,
    DATA_WEIGHT,
    MULTIPLICITY,
    SUCCESS_RATE,
    TOKENS,
    TRAJ_IDS,
    Segments,
    lengths,
)
from tests.datasets.text.chat_tokenizers import (
    CHATML,
    MARKED,
    assistant,
    byte_level,
    sentencepiece,
    user,
)


def rows(size: int = 6, **columns: list[Any]) -> list[Row]:
    made = []
    for k in range(size):
        messages = [user("how many?" + " and" * k), assistant("two " * (k + 1) + str(k))]
        values = {name: column[k] for name, column in columns.items()}
        made.append(to_row({"messages": messages, **values}, f"f:{k}"))
    return made


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_a_text_that_contains_an_end_token_is_told_once(eos):
    tokenizer = byte_level(CHATML)
    tokenizer.eos_token = eos
    made = rows(4)
    for row, text in ((1, "it is <|im_end|> of ChatML"), (3, "two<|im_end|>")):
        made[row] = to_row({"messages": [user("how many?"), assistant(text)]}, f"f:{row}")
    # Those of a question and of a turn that is not trained, and starts of turns, end no answer.
    shown = [user("<|im_end|>?"), {**assistant("<|im_end|>"), "weight": 0}, user("and")]
    made[2] = to_row({"messages": [*shown, assistant("<|im_start|>think")]}, "f:2")
    with pytest.warns(UserWarning) as caught:
        data = tokenize(made, tokenizer)
    assert len(caught) == len(data.notes) == 1
    assert data.notes[0].startswith("the text to train on has '<|im_end|>' in 2 of 4 rows, which")
    assert data.notes[0].endswith("first: f:1")
    # The tokens tell the same: a turn trains one end.
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    batch = data.trajectories
    trained = (batch.get(TOKENS) == end) & batch.get(ASSISTANT_MASK)
    assert [int(trained[batch.get(TRAJ_IDS) == k].sum()) for k in range(4)] == [1, 2, 1, 2]


def test_an_end_token_inside_a_completion_is_told_and_one_at_its_end_is_not():
    tokenizer = byte_level()
    eos = tokenizer.eos_token
    pairs = ["two", f"two{eos}", f"two{eos} and"]
    made = [Row(f"f:{k}", prompt="how many? ", completion=text) for k, text in enumerate(pairs)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(made[:2], tokenizer)
    with pytest.warns(UserWarning, match=r"in 1 of 3 rows, which .*; first: f:2$"):
        ended = tokenize(made, tokenizer)
    # A tokenizer that splits special tokens reads it as text.
    tokenizer.split_special_tokens = True
    assert tokenizer.encode(eos) != [tokenizer.eos_token_id]
    assert len(ended.notes) == 1 and not tokenize(made[2:], tokenizer).notes


def texts(trajectories: Any, tokenizer: Any, mask: Any = ASSISTANT_MASK) -> list[str]:
    ids, tokens, on = (trajectories.get(key) for key in (TRAJ_IDS, TOKENS, mask))
    return [tokenizer.decode(tokens[(ids == i) & on]) for i in ids.unique()]


@pytest.mark.parametrize("pad", ["<|im_end|>", "<|fim_pad|>"])
def test_layout_and_eos_that_is_also_the_padding(pad):
    tokenizer = byte_level(CHATML, pad=pad)
    data = tokenize(rows(), tokenizer)
    batch = data.trajectories
    for key in (TOKENS, ATTENTION_MASK, ASSISTANT_MASK):
        assert batch.get(key).dtype == (torch.int64 if key == TOKENS else torch.bool)
        assert batch.get(key).shape == batch.batch_size
    assert bool(batch.get(ATTENTION_MASK).all())
    assert texts(batch, tokenizer) == ["two " * (k + 1) + f"{k}<|im_end|>" for k in range(6)]
    assert not data.truncated
    # Every token is where the conversation alone has it.
    for k, row in enumerate(rows()):
        alone = tokenizer.apply_chat_template(list(row.messages or ()), return_dict=True)
        part = batch.get(TOKENS)[batch.get(TRAJ_IDS) == k]
        assert part.tolist() == alone["input_ids"]
    # The loss's trajectory length is the number of trained tokens.
    segments = Segments.of(batch, mask=batch.get(ASSISTANT_MASK))
    assert segments.lengths.sum() == batch.get(ASSISTANT_MASK).sum()


def test_scores_feed_curation():
    scores = [0.1, 0.9, 0.5, 0.9000000001, 0.2, 0.3]
    tokenizer = byte_level(CHATML)
    data = tokenize(rows(score=scores), tokenizer)
    best = curate(data.trajectories, cuts=(50, 80), score="score")
    # The best 3 of 6 survive the first cut, the best 2 the second.
    ids = best.get(TRAJ_IDS)
    assert {int(i): int(best.get(MULTIPLICITY)[ids == i][0]) for i in ids.unique()} == {
        1: 2,
        2: 1,
        3: 2,
    }
    # Scores that are equal only in float32 do not tie.
    for seed in range(8):
        top = curate(data.trajectories, cuts=(90,), score="score", seed=seed)
        assert top.get(TRAJ_IDS).unique().tolist() == [3]


def test_correct_filters_and_count_counts():
    tokenizer = byte_level(CHATML)
    data = tokenize(rows(correct=[True, False, True, True, False, True]), tokenizer)
    kept = correct_only(data.trajectories)
    assert kept.get(TRAJ_IDS).unique().tolist() == [0, 2, 3, 5]
    assert texts(kept, tokenizer) == [f"{'two ' * (k + 1)}{k}<|im_end|>" for k in (0, 2, 3, 5)]
    weighted = tokenize(rows(count=[1, 0, 2, 1, 1, 3]), tokenizer).trajectories
    starts = lengths(weighted).cumsum(0) - lengths(weighted)
    assert weighted.get(MULTIPLICITY)[starts].tolist() == [1, 0, 2, 1, 1, 3]
    with pytest.raises(ValueError, match="curate the data they come from"):
        curate(weighted, cuts=(50,), score="length")
    with pytest.raises(ValueError, match="no row is correct .rows: 6."):
        correct_only(tokenize(rows(correct=[False] * 6), tokenizer).trajectories)
    with pytest.raises(KeyError, match="give the rows a column 'correct'"):
        correct_only(weighted)


def test_records_are_read_before_they_are_tokenised():
    with pytest.raises(TypeError, match=r"what iwsft.language.read returns, .* type dict"):
        tokenize([{"prompt": "a", "completion": "b"}], byte_level(CHATML))


def test_truncation_is_counted_and_reported():
    tokenizer = byte_level(CHATML)
    whole = tokenize(rows(), tokenizer)
    sizes = lengths(whole.trajectories)
    limit = int(sizes[3])
    with pytest.warns(UserWarning, match=f"max_length={limit} cut 2 of 6 rows and .*f:4, f:5"):
        cut = tokenize(rows(), tokenizer, max_length=limit)
    assert dict(cut.truncated) == {4: int(sizes[4]) - limit, 5: int(sizes[5]) - limit}
    assert lengths(cut.trajectories).tolist() == sizes.clamp(max=limit).tolist()
    for k in range(6):
        part = [d.trajectories.get(TOKENS)[d.trajectories.get(TRAJ_IDS) == k] for d in (cut, whole)]
        assert torch.equal(part[0], part[1][: len(part[0])])


def test_a_row_without_a_trained_token_is_an_error():
    tokenizer = byte_level(CHATML)
    with pytest.raises(ValueError, match="f:0: max_length=4 cuts off all that is trained.*; drop"):
        tokenize(rows(), tokenizer, max_length=4)
    lone = Row("f:1", prompt="", completion="<|endoftext|>")
    with pytest.raises(ValueError, match="f:1: there is no token to train on"):
        tokenize([lone], byte_level(None, eos="<|endoftext|>"))


def test_the_first_token_is_never_trained():
    tokenizer = byte_level(None, eos="<|endoftext|>")
    data = tokenize([Row("f:1", prompt="", completion="two and two")], tokenizer).trajectories
    mask = data.get(ASSISTANT_MASK)
    assert not mask[0] and bool(mask[1:].all())


def test_rows_of_both_kinds_work_together():
    tokenizer = byte_level(CHATML)
    mixed = [rows(1)[0], to_row({"prompt": "two and", "completion": " two"}, "f:9")]
    assert texts(tokenize(mixed, tokenizer).trajectories, tokenizer) == [
        "two 0<|im_end|>",
        " two<|im_end|>",
    ]


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"prompt": "two"},
        {"messages": (user("q"), assistant("two")), "completion": "and"},
        {"messages": (user("q"), assistant("two")), "prompt": "and"},
    ],
)
def test_a_row_is_of_one_kind(parts):
    with pytest.raises(ValueError, match="f:1: a row has messages, or a prompt and a completion"):
        tokenize([Row("f:1", **parts)], byte_level(CHATML))


def test_columns_that_only_some_rows_have():
    made = rows(3, score=[1.0, None, 2.0])
    with pytest.raises(ValueError, match="f:1: there is no score in 1 of 3 rows"):
        tokenize(made, byte_level())
    with pytest.raises(ValueError, match="f:1: there is no weight in 1 of 3 rows"):
        tokenize(rows(3, weight=[1.0, None, 2.0]), byte_level())
    with pytest.raises(ValueError, match="counts add up to 0"):
        tokenize(rows(2, count=[0, 0]), byte_level())
    with pytest.raises(ValueError, match="the weight of the tokens is 0 everywhere"):
        tokenize(rows(2, weight=[0, 0]), byte_level())
    with pytest.raises(ValueError, match=r"f:1: the weight -1e\+40 is beyond float32"):
        tokenize(rows(2, weight=[1, -1e40]), byte_level())
    with pytest.raises(ValueError, match="no row to tokenise"):
        tokenize([], byte_level())
    with pytest.raises(ValueError, match="max_length=1 leaves nothing"):
        tokenize(rows(1), byte_level(), max_length=1)


@pytest.mark.parametrize(("text", "known"), [("two", True), ("ﬁrst", True), ("two 😀", False)])
def test_characters_that_the_tokenizer_does_not_know_are_noted(text, known):
    made = [to_row({"prompt": "😀", "completion": each}, f"f:{each}") for each in ("and", text)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        notes = tokenize(made, sentencepiece()).notes
    assert len(caught) == len(notes) == (not known)
    assert known or "in 1 of 2 rows" in notes[0] and notes[0].endswith(f"first: f:{text}")


def test_a_template_with_todays_date_is_noted():
    template = "{{ strftime_now('%Y') }}" + CHATML
    with pytest.warns(UserWarning, match="writes today's date"):
        data = tokenize(rows(1), byte_level(), template=template)
    assert len(data.notes) == 1


@pytest.mark.parametrize("count", [10**9, 2**62, 2**70])
def test_counts_of_more_draws_than_an_epoch_can_hold(count):
    with pytest.raises(ValueError, match="counts add up to .* divide them"):
        tokenize(rows(2, count=[count, 1]), byte_level())


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_weights_of_rows_turns_and_tokens_multiply(template):
    tokenizer = byte_level(template)
    talk = [user("q"), assistant("two"), user("no"), assistant("and") | {"weight": 0}]
    talk += [user("q"), assistant("two and two") | {"loss_scale": -0.5}]
    plain, weighted = (
        tokenize([to_row({"messages": talk, **more}, "f:1")], tokenizer).trajectories
        for more in ({}, {"weight": 3})
    )
    mask, weight = plain.get(ASSISTANT_MASK), plain.get(DATA_WEIGHT)
    assert torch.equal(mask, weight != 0) and weight.dtype == torch.float32
    values, sizes = weight[mask].unique_consecutive(return_counts=True)
    assert values.tolist() == [1.0, -0.5] and sizes[0] < sizes[1]
    assert torch.equal(weighted.get(DATA_WEIGHT), 3 * weight)
    assert tokenize(rows(), tokenizer).trajectories.get(DATA_WEIGHT, default=None) is None
    # A list has a number for each token of the row, those of the template included.
    numbers = torch.where(mask, torch.linspace(-1, 1, len(mask)), 0).round(decimals=3)
    numbers[-2] = 0
    listed = tokenize(
        [to_row({"messages": talk, "weight": numbers.tolist()}, "f:1")], tokenizer
    ).trajectories
    assert torch.equal(listed.get(DATA_WEIGHT), numbers * weight)
    assert torch.equal(listed.get(ASSISTANT_MASK), mask & (numbers != 0))
    for wrong, error in (
        (numbers[1:], f"weight has {len(mask) - 1} numbers, and the row {len(mask)} tokens"),
        (numbers + 1, "weight 0 is 1.0, and this token is not trained on; write 0 there"),
        (0 * numbers, "there is no token to train on"),
    ):
        row = to_row({"messages": talk, "weight": wrong.tolist()}, "f:1")
        with pytest.raises(ValueError, match=f"f:1: {error}"):
            tokenize([row], tokenizer)


def test_a_row_weighs_what_it_says_and_is_drawn_once():
    made = [
        to_row({"prompt": "two and", "completion": " two", "weight": w}, "f") for w in (3, -0.5)
    ]
    batch = tokenize(made, byte_level()).trajectories
    mask, weight = batch.get(ASSISTANT_MASK), batch.get(DATA_WEIGHT)
    assert batch.get(MULTIPLICITY, default=None) is None
    for number, expected in enumerate((3.0, -0.5)):
        assert bool((weight[mask & (batch.get(TRAJ_IDS) == number)] == expected).all())


@pytest.mark.parametrize(
    ("of_row", "of_turn"), [(1e-46, 1), (-1e-46, 1), (1e39, 1), (1e-30, 1e-20)]
)
def test_a_weight_that_float32_does_not_have_is_named_with_its_row(of_row, of_turn):
    talk = [user("q"), assistant("two") | {"weight": of_turn}]
    made = [
        to_row({"prompt": "two and", "completion": " two", "weight": 1}, "f:0"),
        to_row({"messages": talk, "weight": of_row}, "f:1"),
    ]
    with pytest.raises(ValueError, match="f:1: the weight .* is beyond float32; scale all by one"):
        tokenize(made, byte_level(CHATML))


def test_log_probs_of_the_policy_that_wrote_a_row():
    """In all or some rows, one for each token; cut with the row, and NaN where there are none."""
    tokenizer = byte_level()
    pair = {"prompt": "2+2=", "completion": "four, I think"}
    number = len(tokenize([to_row(pair, "f:1")], tokenizer).trajectories)
    logs = torch.linspace(0, -9, number).tolist()
    rows = [to_row({**pair, "ref_log_probs": logs}, "f:1"), to_row(pair, "f:2")]
    assert "given_ref_log_prob" not in tokenize(rows[1:], tokenizer).trajectories
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = tokenize(rows, tokenizer, max_length=number - 2).trajectories
    first, second = data["given_ref_log_prob"].split(number - 2)
    assert first.tolist() == logs[:-2] and bool(second.isnan().all())
    with pytest.raises(ValueError, match=f"f:1: ref_log_probs has {number - 1} numbers, and the"):
        tokenize([to_row({**pair, "ref_log_probs": logs[1:]}, "f:1")], tokenizer)
    for wrong in (-0.5, [0.0, None], "0", [0.0, 0.5], [math.nan]):
        with pytest.raises(ValueError, match="ref_log_probs must be a list with a number of at mo"):
            to_row({**pair, "ref_log_probs": wrong}, "f:1")


def test_a_verdict_and_a_negative_weight_are_two_signs() -> None:
    rows = [
        to_row(
            {"prompt": "2+2=", "completion": text, "correct": text == "4", "weight": weight}, "f"
        )
        for text, weight in (("4", 1), ("5", -1))
    ]
    with pytest.raises(ValueError, match="a row that is right or wrong has a negative weight"):
        weigh_correct(tokenize(rows, byte_level()).trajectories)


def test_the_success_rate_is_that_of_the_prompt_where_it_has_several_rows():
    asked = [("two and", True), ("how", False), ("two and", False), ("two and", True), ("2", True)]
    made = [
        to_row({"prompt": prompt, "completion": " two", "correct": right}, "f")
        for prompt, right in (*asked, ("two", False), ("two", False))
    ]
    batch = tokenize(made, byte_level()).trajectories
    weighed = weigh_correct(batch)
    ends = lengths(batch).cumsum(0) - 1
    expected = [2 / 3, 3 / 7, 2 / 3, 2 / 3, 3 / 7, 0, 0]
    assert weighed.get(SUCCESS_RATE)[ends].tolist() == pytest.approx(expected)
    assert weighed.get(DATA_WEIGHT)[ends].tolist() == [1, -1, -1, 1, 1, -1, -1]
    assert batch.get(SUCCESS_RATE, default=None) is None
