"""Encoding of texts in pieces: `tokenizers` takes ninety bytes of memory for each byte of one string."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from transformer.data.tokenizers.base import Tokenizer

_BETWEEN_WORDS = re.compile(r"(?<=\S)(?=[ \n]\S)")
_LONG = 1 << 20
_PIECE = 1 << 18
_AROUND = 200
_TRIES = 8


def in_pieces(text: str, size: int) -> Iterator[str]:
    """A text in pieces of about `size` characters.

    The text is cut before a single space or newline between two words. There the splitting into words starts again, both by
    GPT-2's pattern and by white space, and the words equal the words of the whole text. If there is no such position within four
    times the size, a text is cut anywhere.

    >>> list(in_pieces("one two  three four", 5))
    ['one two  three', ' four']
    """
    start = 0
    while len(text) - start > size:
        found = _BETWEEN_WORDS.search(text, start + size, start + 4 * size)
        stop = found.start() if found else min(start + 4 * size, len(text))
        yield text[start:stop]
        start = stop
    if start < len(text) or not text:
        yield text[start:]


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Int[np.ndarray, " n"]]:
    """Ids of texts; many at once if the tokenizer has an `encode_batch`, and a long text piece by piece.

    A long text is cut where the ids around the cut equal the ids of its two sides: between words, for a tokenizer that splits
    text into words. Without such a position, it is encoded whole.
    """
    together = getattr(tokenizer, "encode_batch", None)
    if together is None:
        return [tokenizer.encode(text) for text in texts]
    short = iter(together([text for text in texts if len(text) <= _LONG]))
    return [next(short) if len(text) <= _LONG else _encode_long(tokenizer, text) for text in texts]


def encode_stream(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[Int[np.ndarray, " n"]]:
    """Ids of a text that comes in pieces, equal to the ids of the whole; text is held only until a position to cut is found."""
    text, enough = "", 2 * _LONG
    for more in texts:
        text += more
        if len(text) >= enough:
            ids, text = _encode_start(tokenizer, text)
            yield from ids
            enough = 2 * max(len(text), _LONG)
    yield _encode_long(tokenizer, text)


def _encode_long(tokenizer: Tokenizer, text: str) -> Int[np.ndarray, " n"]:
    ids, rest = _encode_start(tokenizer, text)
    return np.concatenate([*ids, tokenizer.encode(rest)])


def _encode_start(tokenizer: Tokenizer, text: str) -> tuple[list[Int[np.ndarray, " n"]], str]:
    """Ids of the pieces that can be cut off the start of a text, and the remaining text."""
    ids, start = [], 0
    while len(text) - start > _LONG:
        breaks = itertools.islice(_BETWEEN_WORDS.finditer(text, start + _PIECE), _TRIES)
        stop = next((found.start() for found in breaks if _divides(tokenizer, text, found.start())), start)
        if stop == start:
            break
        ids.append(tokenizer.encode(text[start:stop]))
        start = stop
    return ids, text[start:]


def _divides(tokenizer: Tokenizer, text: str, position: int) -> bool:
    left, right = text[max(0, position - _AROUND) : position], text[position : position + _AROUND]
    both = np.concatenate([tokenizer.encode(left), tokenizer.encode(right)])
    return np.array_equal(both, tokenizer.encode(left + right))
