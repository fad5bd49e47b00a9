"""Records of text as token ids, and their stored form."""

import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, Integer
from tensorflow_datasets.proto import tf_example_pb2

from transformer.data.documents import CONVERSATION
from transformer.data.source import Record
from transformer.data.tokenizers import Tokenizer
from transformer.data.tokenizers.chat import learnt_ids
from transformer.data.tokenizers.long import encode_all, encode_stream
from transformer.tokenizer import around_text, document_start


class Encoded(NamedTuple):
    """The token ids of a document, or of a piece of one."""

    tokens: Integer[np.ndarray, " n"]
    """Each id but the first is a target, predicted from the ids before it; a document without text has no target."""
    learnt: Integer[np.ndarray, " m"]
    """Lengths of consecutive runs of targets with weights 0, 1, 0, ... in turn. Targets after the last run have the weight that
    comes next; without runs, all targets have weight 1."""
    last: bool
    """Whether a document ends here."""

    @property
    def num_targets(self) -> int:
        """The number of predicted tokens, of any weight."""
        return max(0, len(self.tokens) - 1)

    @property
    def weights(self) -> Float[np.ndarray, " n"]:
        """The weight of each target; do not write to them."""
        if len(self.learnt) == 0 and self.num_targets > _MANY:
            return np.broadcast_to(np.float32(1), (self.num_targets,))  # needs no memory
        if len(self.learnt) == 0:
            return _ones(self.num_targets.bit_length())[: self.num_targets]
        runs = np.append(self.learnt.astype(np.int64), self.num_targets - self.learnt.sum(dtype=np.int64))
        return np.repeat(np.arange(len(runs)) % 2, runs).astype(np.float32)


_MANY = 1 << 16


@functools.cache
def _ones(bits: int) -> Float[np.ndarray, " n"]:
    ones = np.ones(1 << bits, np.float32)
    ones.flags.writeable = False
    return ones


_ALL = np.zeros(0, np.uint32)


def encode_records(tokenizer: Tokenizer, records: Sequence[Record]) -> Iterator[Encoded]:
    """Records as ids; a document begins with `document_start` and ends with end-of-text.

    The prompt has weight 0. The first token of a piece that continues a document is input only, not a target, because its context
    is in another record. For a tokenizer with ids on both sides of a text, such as BERT's, the final id is an input too, with
    nothing to predict from it. In a conversation, the assistant's tokens have weight 1; its template begins and ends it.
    """
    texts = [(record.prompt, record.text) for record in records if record.prompt != CONVERSATION]
    encoded = iter(encode_all(tokenizer, [part for pair in texts for part in pair if part]))
    for record in records:
        if record.prompt == CONVERSATION:
            ids, learnt = learnt_ids(tokenizer, json.loads(record.text))
            yield Encoded(ids, learnt_runs(learnt[1:]), True)
        else:
            prompt, text = (next(encoded) if part else _ALL for part in (record.prompt, record.text))
            yield _framed(tokenizer, record, prompt, text)


def _framed(tokenizer: Tokenizer, record: Record, prompt: np.ndarray, text: np.ndarray) -> Encoded:
    if len(text) == 0:
        return Encoded(np.empty(0, np.int32), _ALL, record.last)
    start = () if record.continues else (document_start(tokenizer),)
    closed = record.last and all(around_text(tokenizer))
    end = (tokenizer.end_of_text,) * (record.last + closed)
    tokens = np.concatenate([np.array(start, np.int32), prompt, text, np.array(end, np.int32)]).astype(np.int32)
    if closed:
        return Encoded(tokens, np.array([len(prompt), len(tokens) - 2 - len(prompt), 1], np.uint32), True)
    return Encoded(tokens, np.array([len(prompt)], np.uint32) if len(prompt) else _ALL, record.last)


def encode_long(tokenizer: Tokenizer, prompt: str, texts: Iterable[str], most: int) -> Iterator[Encoded]:
    """A document whose text comes in pieces, encoded as by `encode_records`, in parts of at most `most` targets.

    Each part begins with the last token of the previous part.
    """
    of_prompt = encode_all(tokenizer, [prompt])[0] if prompt else _ALL
    start = np.append(document_start(tokenizer), of_prompt).astype(np.int32)
    closed = all(around_text(tokenizer))
    end = np.full(1 + closed, tokenizer.end_of_text, np.int32)
    held, done = start[:0], 0
    for ids in itertools.chain((start,), encode_stream(tokenizer, texts), (end,)):
        held = np.concatenate([held, ids]).astype(np.int32)
        while len(held) > most + 1:
            yield Encoded(held[: most + 1], learnt_runs(np.arange(done, done + most) >= len(of_prompt)), False)
            held, done = held[most:], done + most
    learnt = np.arange(done, done + len(held) - 1) >= len(of_prompt)
    learnt[len(learnt) - closed :] = False
    yield Encoded(held, learnt_runs(learnt), True)


def learnt_runs(learnt: np.ndarray) -> np.ndarray:
    """The runs in `Encoded.learnt`, from a mask of targets with weight."""
    if learnt.all():
        return _ALL
    changes = np.flatnonzero(np.diff(learnt, prepend=False))
    ends = changes if learnt.any() else np.array([len(learnt)])
    return np.diff(ends, prepend=0).astype(np.uint32)


# ---- Stored form -------------------------------------------------------------------------------------------------------
#
# A record is a `tf.train.Example`, as read by TFDS, with the tokens last. The tokens are therefore a view of the record: TFDS's
# own reader takes twenty times as long.


def token_type(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds the ids of a vocabulary."""
    return np.min_scalar_type(vocab_size - 1)


def token_features(vocab_size: int) -> Mapping[str, Any]:
    """The TFDS features of stored tokens."""
    return {
        "last": tfds.features.Scalar(np.bool_),
        "learnt": tfds.features.Tensor(shape=(None,), dtype=np.uint32, encoding="bytes"),
        "tokens": tfds.features.Tensor(shape=(None,), dtype=token_type(vocab_size).type, encoding="bytes"),
    }


def _varint(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _part(tag: int, content: bytes) -> bytes:
    return bytes([tag]) + _varint(len(content)) + content


def _entry(name: bytes, feature: bytes) -> bytes:
    return _part(0x0A, _part(0x0A, name) + _part(0x12, feature))


def _array(name: bytes, values: bytes) -> bytes:
    return _entry(name, _part(0x0A, _part(0x0A, values)))


_LAST = {last: _entry(b"last", _part(0x1A, _part(0x0A, bytes([last])))) for last in (False, True)}
_PLAIN = {last: part + _array(b"learnt", b"") for last, part in _LAST.items()}
_LEARNT_AT = len(_LAST[True])


def pack_text(record: Record, name: str) -> bytes:
    """A stored record of text, as `TEXT_FEATURES` describes it."""
    flags = {"continues": int(record.continues), "last": int(record.last)}
    return pack_fields(flags | {"text": record.text, "prompt": record.prompt, "name": name})


def pack_fields(fields: Mapping[str, str | bytes | int]) -> bytes:
    """A record of named texts, bytes and numbers, in order."""
    return _part(0x0A, b"".join(_field(name.encode(), value) for name, value in fields.items()))


def unpack_fields(record: bytes) -> Mapping[str, Any]:
    """The features of a record by name, as `tf.train.Feature`."""
    example: Any = tf_example_pb2.Example.FromString(record)  # pyright: ignore[reportAttributeAccessIssue]
    return example.features.feature


def _field(name: bytes, value: str | bytes | int) -> bytes:
    if isinstance(value, int):
        return _entry(name, _part(0x1A, _part(0x0A, _varint(value % 2**64))))
    return _array(name, value.encode() if isinstance(value, str) else value)


def pack(encoded: Encoded, dtype: np.dtype) -> bytes:
    """A record of ids with the given type."""
    tokens = _array(b"tokens", encoded.tokens.astype(dtype).tobytes())
    if len(encoded.learnt) == 0:
        return _part(0x0A, _PLAIN[encoded.last] + tokens)
    return _part(0x0A, _LAST[encoded.last] + _array(b"learnt", encoded.learnt.astype(np.uint32).tobytes()) + tokens)


def unpack(record: bytes, dtype: np.dtype) -> Encoded:
    """The ids of a record, as a view of it."""
    start, at = _plain_offsets(len(record))
    if record.startswith(_PLAIN[True], start):
        return Encoded(np.frombuffer(record, dtype, offset=at), _ALL, True)
    if record.startswith(_PLAIN[False], start):
        return Encoded(np.frombuffer(record, dtype, offset=at), _ALL, False)
    _, start = _number(record, 1)
    at, size = _values(record, start + _LEARNT_AT)
    learnt = np.frombuffer(record[at : at + size], np.uint32)
    tokens_at, _ = _values(record, at + size)
    return Encoded(np.frombuffer(record, dtype, offset=tokens_at), learnt, record.startswith(_LAST[True], start))


@functools.lru_cache(1 << 16)
def _plain_offsets(size: int) -> tuple[int, int]:
    """The offsets of the parts of a record with `size` bytes, and of its tokens, if all targets have weight 1."""
    most = size - len(_part(0x0A, _PLAIN[True] + _array(b"tokens", b"")))
    for tokens in range(most, max(-1, most - 25), -1):  # five lengths of five bytes at most
        record = _part(0x0A, _PLAIN[True] + _array(b"tokens", bytes(tokens)))
        if len(record) == size:
            return _number(record, 1)[1], size - tokens
    return 0, 0  # no record begins like this


def _number(record: bytes, at: int) -> tuple[int, int]:
    """A variable-length number, and the offset after it."""
    number = shift = 0
    while record[at] > 127:
        number |= (record[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return number | record[at] << shift, at + 1


def _values(record: bytes, at: int) -> tuple[int, int]:
    """The offset and number of an array's bytes; its entry begins at `at` and has a name of six letters."""
    _, at = _number(record, at + 1)
    at += 2 + 6
    size = 0
    for _ in range(3):
        size, at = _number(record, at + 1)
    return at, size
