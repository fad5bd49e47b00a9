"""The stored form of examples: their texts and classes, and the complete token ids of each text."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from transformer.data.encoded import pack_fields, token_type, unpack_fields
from transformer.data.tokenizers import Tokenizer, source_tokenizer
from transformer.types import UserError

CLASS, SOURCE, TEXT = "class", "source", "text"
"""The role of a part: a class, a text for the source tokenizer, or any other text."""

Roles = Mapping[str, str]
"""The role of each part of an example, by its name in the records, in order."""

_CHARACTERS_AT_ONCE = 1 << 20


def unpack_parts(record: bytes, roles: Roles) -> list[str | int]:
    """The texts and the class of a stored example."""
    fields = unpack_fields(record)
    try:
        return [
            int(fields[name].int64_list.value[0])
            if role == CLASS
            else fields[name].bytes_list.value[0].decode("utf-8", "replace")
            for name, role in roles.items()
        ]
    except IndexError:
        raise UserError(
            "A stored dataset must be whole, one example has no value. Remove it and prepare it again."
        ) from None


def unpack_tokens(record: bytes, types: Mapping[str, np.dtype | None]) -> list[Int[np.ndarray, " n"] | int]:
    """The ids of each text of an example, and its class.

    Args:
        record: a stored record.
        types: the types of the ids, by name; None for the class.
    """
    fields = unpack_fields(record)
    return [
        int(fields[name].int64_list.value[0])
        if dtype is None
        else np.frombuffer(fields[name].bytes_list.value[0], dtype).astype(np.int32)
        for name, dtype in types.items()
    ]


def types_of(roles: Roles, tokenizer: Tokenizer) -> dict[str, np.dtype | None]:
    """The integer type of the ids of each text; None for the class."""
    return {
        name: token_type(_reader(role, tokenizer).vocab_size) if role != CLASS else None for name, role in roles.items()
    }


def features_of(roles: Roles, tokenizer: Tokenizer) -> dict[str, Any]:
    """The TFDS features of stored tokens."""
    return {
        name: tfds.features.Scalar(np.int64)
        if dtype is None
        else tfds.features.Tensor(shape=(None,), dtype=dtype.type, encoding="bytes")
        for name, dtype in types_of(roles, tokenizer).items()
    }


def pack_tokens(
    examples: Iterator[Sequence[str | int]], roles: Roles, tokenizer: Tokenizer, advance: Callable[[int], object]
) -> Iterator[bytes]:
    """Records of the tokens of examples; `advance` is called with the number of finished characters."""
    types = types_of(roles, tokenizer)
    while some := list(_some(examples)):
        columns = list[Sequence[Any]]()
        for (name, role), column in zip(roles.items(), zip(*some, strict=True), strict=True):
            dtype = types[name]
            ids = encode_texts(_reader(role, tokenizer), column) if dtype is not None else column
            columns.append(ids if dtype is None else [one.astype(dtype).tobytes() for one in ids])
        for parts in zip(*columns, strict=True):
            yield pack_fields(dict(zip(roles, parts, strict=True)))
        advance(sum(_characters(example) for example in some))


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Int[np.ndarray, " n"]]:
    """The ids of texts, encoded as a batch if the tokenizer can."""
    together = getattr(tokenizer, "encode_batch", None)
    return [tokenizer.encode(text) for text in texts] if together is None else together(list(texts))


def _some(examples: Iterator[Sequence[str | int]]) -> Iterator[Sequence[str | int]]:
    size = 0
    while size < _CHARACTERS_AT_ONCE and (example := next(examples, None)) is not None:
        size += _characters(example)
        yield example


def _characters(example: Sequence[str | int]) -> int:
    return sum(len(part) for part in example if isinstance(part, str))


def _reader(role: str, tokenizer: Tokenizer) -> Tokenizer:
    return source_tokenizer(tokenizer) if role == SOURCE else tokenizer
