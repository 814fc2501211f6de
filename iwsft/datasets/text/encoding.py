"""From text with stretches to train on to token ids and their mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Encoded(NamedTuple):
    """Token ids of a row, and whether each is trained on."""

    ids: list[int]
    trained: list[bool]


class Stretch(NamedTuple):
    """Characters ``[start, stop)`` of a text that are trained on."""

    start: int
    stop: int


def check_tokenizer(tokenizer: Any) -> None:
    """Check that a tokenizer has offsets: the characters of each token.

    Raises:
        TypeError: It has none.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} does not tell the characters of a token; load a fast "
            "tokenizer (a folder with tokenizer.json)"
        )


def encode_stretches(
    tokenizer: Any, text: str, stretches: Sequence[Stretch], where: str
) -> Encoded:
    """Tokenise ``text``; the mask is on for the tokens of the stretches.

    Ids are those of the whole text, unless a token would straddle the start of a stretch. There the
    text is tokenised in two pieces, as when a model continues the prompt.

    Args:
        tokenizer: Fast tokenizer; it reads the special tokens of the text and adds none.
        text: Text of the row.
        stretches: Separate stretches in their order.
        where: Place of the row, for errors.

    Raises:
        ValueError: The tokens of a stretch do not decode to its text (white space apart).
    """
    whole = tokenizer(text, add_special_tokens=False)
    cuts = [start for start, stop in stretches if _straddled(whole, start, stop)]
    ids: list[int] = []
    trained: list[bool] = []
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece = tokenizer(text[begin:end], add_special_tokens=False) if cuts else whole
        mask = [False] * len(piece.input_ids)
        for start, stop in stretches:
            if begin <= start < end:
                tokens = token_range(piece, start - begin, stop - begin)
                mask[tokens.start : tokens.stop] = [True] * len(tokens)
                own = piece.input_ids[tokens.start : tokens.stop]
                _check_decoded(tokenizer, own, text[start:stop], where)
        ids += piece.input_ids
        trained += mask
    return Encoded(ids, trained)


def encode_completion(tokenizer: Any, prompt: str, completion: str, where: str) -> Encoded:
    """Tokenise a prompt and its completion; the completion and an EOS after it are trained on.

    BOS comes first where the tokenizer adds it. EOS is not doubled.

    Raises:
        ValueError: The tokenizer has no EOS token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(f"{where}: the tokenizer has no EOS token; set tokenizer.eos_token")
    text = prompt + completion
    ids, trained = encode_stretches(tokenizer, text, [Stretch(len(prompt), len(text))], where)
    if ids[-1] != eos:
        ids, trained = [*ids, eos], [*trained, True]
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][0] == bos and ids[0] != bos:
        ids, trained = [bos, *ids], [False, *trained]
    return Encoded(ids, trained)


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


def _straddled(encoding: Any, start: int, stop: int) -> bool:
    tokens = token_range(encoding, start, stop)
    return bool(tokens) and encoding.token_to_chars(tokens.start).start < start


def _check_decoded(tokenizer: Any, ids: list[int], text: str, where: str) -> None:
    def decoded(tokens: list[int]) -> str:
        return squash(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    result = decoded(ids)
    # A tokenizer may normalise text or not know a character; then its own tokens read otherwise.
    if result not in (squash(text), decoded(tokenizer(text, add_special_tokens=False).input_ids)):
        raise ValueError(
            f"{where}: the tokens to train on read {result[:80]!r}, not {text[:80]!r}; take "
            "another tokenizer"
        )
