"""Readable texts of single tokens, as part of a text or as candidates."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transformer.terminal import printable
from transformer.tokenizer import mask_id, target_start

if TYPE_CHECKING:
    from transformer.data.tokenizers import Tokenizer

_BEFORE = 4  # number of previous tokens that affect the text of one: by a space, or by the bytes of a character


def token_texts(tokenizer: "Tokenizer", ids: Sequence[int] | np.ndarray) -> list[str]:
    """The text of each token with its space; special tokens and single bytes are in brackets.

    Example:
        >>> from transformer.data.tokenizers.bytes import ByteTokenizer
        >>> token_texts(ByteTokenizer(), [256, 97, 10, 195])
        ['⟨end of text⟩', 'a', '↵', '⟨195⟩']
    """
    known = [int(index) for index in ids]
    return [token_text(tokenizer, index, known[max(0, at - _BEFORE) : at]) for at, index in enumerate(known)]


def token_text(tokenizer: "Tokenizer", index: int, before: Sequence[int] = ()) -> str:
    """The text of a token after others; the last byte of a character gives the whole character."""
    if index in getattr(tokenizer, "special", ()):
        return f"⟨{printable(_name(tokenizer, index))}⟩"
    start = tokenizer.decode(list(before)).rstrip("\ufffd")
    whole = tokenizer.decode([*before, index])
    text = whole[len(start) :] if whole.startswith(start) else "\ufffd"
    if "\ufffd" in text:
        text = tokenizer.decode([index])
    name = _name(tokenizer, index)
    if text == "" or "\ufffd" in text:
        # Decoding removes a space before the first word.
        text = "" if name.strip("▁") else " " * len(name)
    return printable(text.replace("\r\n", "↵").replace("\n", "↵").replace("\t", "⇥")) or f"⟨{printable(name)}⟩"


def _name(tokenizer: Any, index: int) -> str:
    """The name of a token without a text."""
    own = getattr(tokenizer, "name_of", None)
    if own is not None and 0 <= index < tokenizer.vocab_size:
        return own(index).strip("<>[]|") or str(index)
    named = {
        getattr(tokenizer, "unknown", None): "unknown",
        target_start(tokenizer): "start",
        mask_id(tokenizer): "mask",
        tokenizer.end_of_text: "end of text",
    }
    return named.get(index, str(index))
