"""From text with stretches to train on to token ids and their mask."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple

# Texts in front of a piece, so that a tokenizer adds no space to it. The first that merges with
# nothing is taken.
_ANCHORS = ("", "\n", "a", ".", "0")


class Encoded(NamedTuple):
    """Token ids of a row, and the data weight of each, 0 where it is not trained on.

    With ``unknown`` the tokenizer does not know all characters to train on.
    """

    ids: list[int]
    weights: list[float]
    unknown: bool = False


class Stretch(NamedTuple):
    """Characters ``[start, stop)`` of a text that are trained on."""

    start: int
    stop: int


class _Piece(NamedTuple):
    """Tokens of a piece of a text that begins at ``start``, the first ``skip`` not the text's."""

    encoding: Any
    start: int
    skip: int


def check_tokenizer(tokenizer: Any) -> None:
    """Check that a tokenizer has offsets, the characters of each token (TypeError)."""
    if not getattr(tokenizer, "is_fast", False):
        way_out = "load a fast tokenizer (a folder with tokenizer.json)"
        kind = type(tokenizer).__name__
        raise TypeError(f"{kind} does not tell the characters of a token; {way_out}")


def encode_stretches(
    tokenizer: Any, text: str, stretches: Mapping[Stretch, float], *, cut: bool = True
) -> Encoded:
    """Tokenise ``text``; its tokens have the weights of their stretches, which are in order.

    Ids are those of the whole text; its special tokens are read, and none added. A token that spans
    the start of a stretch is trained on, or with ``cut`` there is none: the text is tokenised in
    two pieces, as when a model continues the prompt, without the space that some tokenizers put in
    front of a text.

    A ValueError says that the tokens of a stretch do not decode to its text (white space apart), or
    those of the pieces to the whole (white space included).
    """
    whole = tokenizer(text, add_special_tokens=False)
    starts = [start for start, stop in stretches if cut and _straddled(whole, start, stop)]
    pieces = [_Piece(whole, 0, 0)]
    if starts:
        pieces = [_Piece(tokenizer(text[: starts[0]], add_special_tokens=False), 0, 0)]
        for start, stop in itertools.pairwise([*starts, len(text)]):
            tail = pieces[-1].encoding.input_ids[-1:]
            pieces.append(_continue(tokenizer, tail, text[start:stop], start))
    ids: list[int] = []
    weights: list[float] = []
    unknown = False
    for piece, (low, high) in zip(pieces, itertools.pairwise([0, *starts, len(text)]), strict=True):
        own = [0.0] * len(piece.encoding.input_ids)
        for stretch, weight in stretches.items():
            if low <= stretch.start < high:
                begin, end = stretch.start - piece.start, stretch.stop - piece.start
                tokens = token_range(piece.encoding, begin, end)
                own[tokens.start : tokens.stop] = [weight] * len(tokens)
                unknown |= not _reads_whole(tokenizer, piece, tokens, text, stretch)
        ids += piece.encoding.input_ids[piece.skip :]
        weights += own[piece.skip :]
    if starts:
        cut_up, uncut = (_decode(tokenizer, each) for each in (ids, whole.input_ids))
        if cut_up != uncut and squash(cut_up) == squash(uncut):
            way_out = "move it from the prompt to the completion, or take another tokenizer"
            raise ValueError(f"this tokenizer drops white space at the end of a text; {way_out}")
    return Encoded(ids, weights, unknown)


def _continue(tokenizer: Any, tail: list[int], own: str, start: int) -> _Piece:
    """Tokenise the text ``own`` from ``start`` on so that it reads as it is behind ``tail``."""

    def read(ids: list[int]) -> str:
        return unicodedata.normalize("NFKC", _decode(tokenizer, ids))

    white = own[: len(own) - len(own.lstrip())]
    alone = tokenizer(own, add_special_tokens=False)
    before, expected = read(tail), [unicodedata.normalize("NFKC", own)]
    for anchor in _ANCHORS:
        encoding = tokenizer(anchor + own, add_special_tokens=False) if anchor else alone
        if not anchor or not _straddled(encoding, len(anchor), len(anchor) + 1):
            skip = token_range(encoding, 0, len(anchor)).stop
            result = read(tail + encoding.input_ids[skip:]).removeprefix(before)
            if result not in expected:
                # A tokenizer may normalise text or not know a character; so do its own tokens.
                own_text = white + read(alone.input_ids).lstrip()
                expected[1:] = [unicodedata.normalize("NFKC", own_text)]
            if result in expected:
                return _Piece(encoding, start - len(anchor), skip)
    way_out = "move white space between them from one to the other, or drop the row"
    raise ValueError(f"this tokenizer can't continue the prompt with {own[:20]!r}; {way_out}")


def encode_completion(tokenizer: Any, prompt: str, completion: str) -> Encoded:
    """Tokenise a prompt and its completion; the completion and an EOS after it are trained on.

    BOS comes first where the tokenizer adds it. EOS is not doubled, and there must be one.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token; set tokenizer.eos_token")
    text = prompt + completion
    stretch = Stretch(len(prompt), len(text))
    ids, weights, unknown = encode_stretches(tokenizer, text, {stretch: 1.0})
    if ids[-1] != eos:
        ids, weights = [*ids, eos], [*weights, 1.0]
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][0] == bos and ids[0] != bos:
        ids, weights = [bos, *ids], [0.0, *weights]
    return Encoded(ids, weights, unknown)


def token_range(encoding: Any, start: int, stop: int) -> range:
    """Return the tokens of the characters ``[start, stop)``; empty where no token has one."""
    # A character may be in no token, such as white space that the tokenizer drops.
    first, last = (
        next((token for c in chars if (token := encoding.char_to_token(c)) is not None), None)
        for chars in (range(start, stop), reversed(range(start, stop)))
    )
    if first is None or last is None:
        return range(0)
    # A character outside the byte alphabet is several tokens, of which the first is given.
    end, chars = last + 1, encoding.token_to_chars(last)
    while end < len(encoding["input_ids"]) and encoding.token_to_chars(end) == chars:
        end += 1
    return range(first, end)


def squash(text: str) -> str:
    """Remove white space from ``text``."""
    return "".join(text.split())


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _straddled(encoding: Any, start: int, stop: int) -> bool:
    tokens = token_range(encoding, start, stop)
    return bool(tokens) and encoding.token_to_chars(tokens.start).start < start


def _reads_whole(tokenizer: Any, piece: _Piece, tokens: range, text: str, stretch: Stretch) -> bool:
    """Whether tokens read as all of their stretch, normalised; a ValueError if as other text."""
    if not tokens:
        return not squash(text[slice(*stretch)])
    first, last = (piece.encoding.token_to_chars(token) for token in (tokens[0], tokens[-1]))
    # The first or last token may reach beyond the stretch. A normaliser that composes characters
    # gives offsets that are too narrow.
    start = min(stretch.start, piece.start + first.start)
    own = text[start : max(stretch.stop, piece.start + last.end)]
    result = squash(_decode(tokenizer, piece.encoding.input_ids[tokens.start : tokens.stop]))
    if result == squash(own):
        return True
    # A tokenizer may normalise text or not know a character; then its own tokens read otherwise.
    alone = tokenizer(own, add_special_tokens=False)
    if result != squash(_decode(tokenizer, alone.input_ids)):
        problem = f"the tokens to train on read {result[:80]!r}, not {own[:80]!r}"
        raise ValueError(f"{problem}; take another tokenizer")
    normalizer = tokenizer.backend_tokenizer.normalizer
    normal = own if normalizer is None else normalizer.normalize_str(own)
    # Sentencepiece writes spaces as this sign.
    return squash(result.replace("\u2581", " ")) == squash(normal.replace("\u2581", " "))
