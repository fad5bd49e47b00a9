"""What tokens look like to a person, one by one: in a text, and as candidates for a place in it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from transformer.terminal import printable
from transformer.tokenizer import mask_id, target_start

_BEFORE = 4  # tokens before one that decide how it is decoded: a space, the bytes of a character


def token_texts(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> list[str]:
    """Each token of a text as it stands there, with its space; special ones and single bytes in brackets.

    Example:
        >>> from transformer.data.tokenizers.bytes import ByteTokenizer
        >>> token_texts(ByteTokenizer(), [256, 97, 10, 195])
        ['⟨end of text⟩', 'a', '↵', '⟨195⟩']
    """
    known = [int(index) for index in ids]
    return [token_text(tokenizer, index, known[max(0, at - _BEFORE) : at]) for at, index in enumerate(known)]


def token_text(tokenizer: Any, index: int, before: Sequence[int] = ()) -> str:
    """A token as it would stand behind others; the last byte of a character stands for all of it."""
    if index in getattr(tokenizer, "special", ()):
        return f"⟨{printable(_name(tokenizer, index))}⟩"
    start = tokenizer.decode(list(before)).rstrip("\ufffd")
    whole = tokenizer.decode([*before, index])
    text = whole[len(start) :] if whole.startswith(start) else "\ufffd"
    if "\ufffd" in text:
        text = tokenizer.decode([index])
    if text == "" or "\ufffd" in text:
        name = _name(tokenizer, index)
        # A space before the first word is in no text that is decoded.
        text = "" if name.strip("▁") else " " * len(name)
    return printable(text.replace("\r\n", "↵").replace("\n", "↵").replace("\t", "⇥")) or f"⟨{printable(name)}⟩"


def _name(tokenizer: Any, index: int) -> str:
    """What a token is called that stands for no text of its own."""
    own = getattr(tokenizer, "name_of", None)
    if own is not None and 0 <= index < tokenizer.vocab_size:
        return own(index).strip("<>[]|") or str(index)
    named = {target_start(tokenizer): "start", mask_id(tokenizer): "mask", tokenizer.end_of_text: "end of text"}
    return named.get(index, str(index))
