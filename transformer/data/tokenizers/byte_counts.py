"""The number of text bytes of each token of a `tokenizer.json`, if the tokens of a text spell the text."""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_FAITHFUL = ("Split", "ByteLevel", "Digits", "Punctuation", "Metaspace")
_IN_UTF8 = [*range(0xC0), *range(0xC2, 0xF5)]


class Counts(NamedTuple):
    """The byte counts of tokens."""

    token_bytes: Int[np.ndarray, " V"]
    """All zeros if tokens do not determine their text."""
    adds_space: bool
    """Whether a space is added before each text, and counted with its first token."""


def count_bytes(fields: Mapping[str, Any], vocabulary: Mapping[str, int], special: set[int], size: int) -> Counts:
    """The number of bytes of each token.

    The counts of a text's tokens add up to its bytes (to its NFC form's, if the file has that normalizer), provided that
    the file drops nothing. That holds if bytes are written as characters (byte-level), or if spaces are written as `▁` and
    characters without a token as bytes (byte fallback). A `▁` in a text then counts as a space. All other tokenizers (lower
    case, unknown words) have zeros.

    Args:
        fields: the content of the file.
        vocabulary: every token with its id.
        special: ids that stand for no text.
        size: the length of the table.
    """
    model = fields["model"]
    normalizers = list(_parts(fields.get("normalizer"), "normalizers"))
    pre_tokenizers = list(_parts(fields.get("pre_tokenizer"), "pretokenizers"))
    counts = Counts(np.zeros(size, np.int32), False)
    added = {token["id"]: token for token in fields.get("added_tokens") or () if token["id"] not in special}
    byte_level = any(part["type"] == "ByteLevel" for part in (*normalizers, *pre_tokenizers))
    if not (
        _keeps_pieces(model, byte_level)
        and all(_keeps_text(part) for part in normalizers)
        and all(part["type"] in _FAITHFUL and part.get("behavior") != "Removed" for part in pre_tokenizers)
        and not any(token.get("lstrip") or token.get("rstrip") for token in added.values())
    ):
        return counts
    spaces = not byte_level and any(
        part["type"] == "Metaspace" or (part["type"] == "Replace" and part["content"] == _SPACE)
        for part in (*normalizers, *pre_tokenizers)
    )
    for token, index in vocabulary.items():
        if index in special:
            continue
        if byte_level and index not in added:
            counts.token_bytes[index] = len(token)
        elif not byte_level and _BYTE.fullmatch(token):
            counts.token_bytes[index] = 1
        else:
            counts.token_bytes[index] = len((token.replace(_SPACE, " ") if spaces else token).encode())
    return counts._replace(adds_space=any(_adds_space(part) for part in (*normalizers, *pre_tokenizers)))


def _parts(part: Any, name: str) -> Iterator[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer, or the members of a sequence of them."""
    if part is not None and part["type"] == "Sequence":
        for inner in part[name]:
            yield from _parts(inner, name)
    elif part is not None:
        yield part


def _keeps_text(normalizer: Mapping[str, Any]) -> bool:
    named, pattern = normalizer["type"], normalizer.get("pattern")
    replaces_space = named == "Replace" and pattern == {"String": " "} and normalizer["content"] == _SPACE
    return named in ("NFC", "ByteLevel") or replaces_space or (named == "Prepend" and normalizer["prepend"] == _SPACE)


def _adds_space(part: Mapping[str, Any]) -> bool:
    # Older Metaspace files use the key `add_prefix_space`.
    never = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never") == "never"
    return part["type"] == "Prepend" or (
        not never if part["type"] == "Metaspace" else part["type"] == "ByteLevel" and part.get("add_prefix_space", True)
    )


@functools.cache
def byte_alphabet() -> Mapping[int, str]:
    """The character that stands for each byte in a byte-level vocabulary."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return {**{byte: chr(byte) for byte in kept}, **{byte: chr(256 + index) for index, byte in enumerate(others)}}


def _keeps_pieces(model: Mapping[str, Any], byte_level: bool) -> bool:
    """Whether each character has a token, or a token for each of its bytes."""
    plain = not model.get("continuing_subword_prefix") and not model.get("end_of_word_suffix")
    if model.get("type") not in ("BPE", "Unigram") or not plain:
        return False
    pieces = model["vocab"]
    known = set(pieces) if isinstance(pieces, dict) else {piece for piece, _ in pieces}
    if byte_level:
        return all(byte_alphabet()[byte] in known for byte in _IN_UTF8)
    return bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in known for byte in _IN_UTF8)


def in_alphabet(text: str) -> str:
    """A text as a byte-level vocabulary spells it.

    >>> in_alphabet(" é")
    'ĠÃ©'
    """
    return "".join(byte_alphabet()[byte] for byte in text.encode())
