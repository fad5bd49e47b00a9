"""Shards of tokens: their content, written in this process or by several processes with one shard at a time each."""

import array
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt

from transformer.data.builder import shard_path
from transformer.data.encoded import (
    Encoded,
    encode_long,
    encode_records,
    learnt_runs,
    pack,
    token_features,
    token_type,
    unpack,
    unpack_fields,
)
from transformer.data.example_parts import features_of, pack_tokens, unpack_parts
from transformer.data.long_text import LONG
from transformer.data.records import RandomAccess
from transformer.data.shards import Shards, count_records, write_shard
from transformer.data.source import Record, pieces
from transformer.data.tokenizers import Tokenizer, load_tokenizer
from transformer.tokenizer import TOKENIZERS
from transformer.types import UserError
from transformer.validation import require

_CHARACTERS_AT_ONCE = 1 << 20
LONGEST = 1 << 20
"""Most targets of a stored record; a longer document has several records."""


class TextRecords(RandomAccess[Record]):
    """The records of stored text, read at random.

    Args:
        shards: the files of the text.
        fields: names of the text and the prompt in a TFDS dataset, whose records are documents; by default, the names
            in text prepared by this package.
        cut: size in bytes of the pieces of documents, which are then in memory; 0 means whole documents.
    """

    def __init__(self, shards: Shards, fields: Sequence[str] = (), cut: int = 0) -> None:
        self.shards, self.fields, self.cut = shards, list(fields), cut

    def __len__(self) -> int:
        return len(self._pieces) if self.cut else len(self.shards)

    def _read(self, index: int) -> Record:
        return self._pieces[index] if self.cut else self._stored(index)

    @functools.cached_property
    def _pieces(self) -> list[Record]:
        documents = map(self._stored, range(len(self.shards)))
        return [piece for one in documents for piece in pieces(one.text, one.prompt, self.cut)]

    def _stored(self, index: int) -> Record:
        parts = unpack_fields(self.shards[index])
        if self.fields:
            require(
                len(parts[self.fields[0]].bytes_list.value) > 0,
                f"A stored dataset must be whole, example {index:,} has no {self.fields[0]!r}. Remove it and prepare it again.",
            )
            text, prompt = (b"".join(parts[name].bytes_list.value).decode("utf-8", "replace") for name in self.fields)
            return Record(text, prompt, continues=False, last=True)
        text, prompt = (parts[name].bytes_list.value[0].decode() for name in ("text", "prompt"))
        continues, last = (bool(parts[name].int64_list.value[0]) for name in ("continues", "last"))
        return Record(text, prompt, continues, last)


@dataclasses.dataclass(frozen=True)
class Job:
    """A split whose tokens are to be stored."""

    texts: list[str]
    """The files of the text."""
    lengths: list[int]
    """The number of records of each file."""
    directory: str
    split: str
    num_shards: int
    whole: bool
    """Whether a token record is a document, or a record of the text."""
    roles: dict[str, str] = dataclasses.field(default_factory=dict)
    """For examples, the roles of their parts (`example_parts.Roles`)."""
    fields: list[str] = dataclasses.field(default_factory=list)
    """For a TFDS dataset, the `fields` of `TextRecords`."""
    cut: int = 0
    """For a TFDS dataset, the `cut` of `TextRecords`."""

    @property
    def records(self) -> TextRecords:
        """Open the text."""
        return TextRecords(Shards(self.texts, self.lengths), self.fields, self.cut)

    def features(self, tokenizer: Tokenizer) -> Mapping[str, Any]:
        """The TFDS features of the tokens."""
        return features_of(self.roles, tokenizer) if self.roles else token_features(tokenizer.vocab_size)

    def path(self, shard: int) -> epath.Path:
        """The path of a shard, named as by TFDS."""
        return shard_path(epath.Path(self.directory), "tokens", self.split, shard, self.num_shards)

    def sizes_path(self, shard: int) -> epath.Path:
        """The temporary file with the sizes of a shard's records, until all shards are written."""
        return epath.Path(self.directory) / f"{SIZES}-{shard:05}-of-{self.num_shards:05}"


SIZES = "sizes"
"""The file beside stored tokens with the number of targets of each record; counting then reads no tokens."""


def write_tokens(job: Job, tokenizer: Tokenizer, shard: int, advance: Callable[[int], object]) -> None:
    """Write a shard: the tokens of an equal part of the records; `advance` is called with the number of finished characters."""
    if job.roles:
        stored = Shards(job.texts, job.lengths)
        start, stop = (part * len(stored) // job.num_shards for part in (shard, shard + 1))
        examples = (unpack_parts(stored[index], job.roles) for index in range(start, stop))
        write_shard(job.path(shard), pack_tokens(examples, job.roles, tokenizer, advance))
        return
    records, dtype = job.records, token_type(tokenizer.vocab_size)
    start, stop = (part * len(records) // job.num_shards for part in (shard, shard + 1))
    if job.whole:
        encoded = _encode_documents(tokenizer, _documents(records, start, stop), advance)
    else:
        encoded = _encode(tokenizer, map(records.__getitem__, range(start, stop)), advance)
    sizes = array.array("I")

    def packed() -> Iterator[bytes]:
        for part in encoded:
            sizes.append(part.num_targets)
            yield pack(part, dtype)

    write_shard(job.path(shard), packed())
    write_shard(job.sizes_path(shard), [np.array(sizes, _SIZE).tobytes()])


def write_sizes(job: Job, dtype: np.dtype) -> None:
    """Write the sizes of all shards in one file. If a kill separated a shard from its sizes, the shard is read."""
    parts = [_sizes_of(job, shard, dtype) for shard in range(job.num_shards)]
    write_shard(epath.Path(job.directory) / SIZES, parts)
    for shard in range(job.num_shards):
        job.sizes_path(shard).unlink(missing_ok=True)


def _sizes_of(job: Job, shard: int, dtype: np.dtype) -> bytes:
    path, sizes = job.path(shard), job.sizes_path(shard)
    with contextlib.suppress(UserError):  # another process may finish, and remove the file, at any moment
        if sizes.exists():
            return Shards([sizes], [1])[0]
    return record_sizes(Shards([path], [count_records(path)]), dtype).tobytes()


def record_sizes(records: Shards, dtype: np.dtype) -> UInt[np.ndarray, " n"]:
    """The number of targets of each stored record, found by reading the records."""
    return np.fromiter((unpack(records[index], dtype).num_targets for index in range(len(records))), _SIZE)


def read_sizes(directory: epath.Path, num_shards: int) -> UInt[np.ndarray, " n"]:
    """Read the file that `write_sizes` wrote."""
    stored = Shards([directory / SIZES], [num_shards])
    return np.concatenate([np.frombuffer(stored[shard], _SIZE) for shard in range(num_shards)])


_SIZE = np.dtype("<u4")


def _size(record: Record) -> int:
    return len(record.text) + len(record.prompt)


def _encode(tokenizer: Tokenizer, records: Iterable[Record], advance: Callable[[int], object]) -> Iterator[Encoded]:
    """The parts of records, encoded in groups of about a fixed number of characters."""
    some, size = list[Record](), 0
    for record in records:
        some.append(record)
        size += _size(record)
        if size >= _CHARACTERS_AT_ONCE:
            yield from _encode_some(tokenizer, some)
            advance(size)
            some, size = [], 0
    yield from _encode_some(tokenizer, some)
    advance(size)


def _encode_some(tokenizer: Tokenizer, records: Sequence[Record]) -> Iterator[Encoded]:
    return itertools.chain.from_iterable(map(_parts, encode_records(tokenizer, records)))


def _encode_documents(
    tokenizer: Tokenizer, documents: Iterable[tuple[Iterable[Record], bool]], advance: Callable[[int], object]
) -> Iterator[Encoded]:
    """The parts of documents; each is given as its pieces, and whether these exceed the memory limit."""
    for long, some in itertools.groupby(documents, lambda document: document[1]):
        if not long:
            yield from _encode(tokenizer, (_joined(parts) for parts, _ in some), advance)
            continue
        for parts, _ in some:
            rest = iter(parts)
            first = next(rest)
            yield from encode_long(tokenizer, first.prompt, _reported(itertools.chain([first], rest), advance), LONGEST)


def _reported(pieces: Iterable[Record], advance: Callable[[int], object]) -> Iterator[str]:
    for piece in pieces:
        yield piece.text
        advance(_size(piece))


def _joined(pieces: Iterable[Record]) -> Record:
    first, *rest = pieces
    return Record("".join([first.text, *(piece.text for piece in rest)]), first.prompt, continues=False, last=True)


def _documents(records: Sequence[Record], start: int, stop: int) -> Iterator[tuple[Iterable[Record], bool]]:
    """The pieces of each document that begins in a range of records, and whether they are long; long ones are read again."""
    index = start
    while index < stop and records[index].continues:
        index += 1
    while index < stop:
        first, size, pieces, piece = index, 0, list[Record](), records[index]
        while not piece.last:
            size += _size(piece)
            if size <= LONG:
                pieces.append(piece)
            index += 1
            piece = records[index]
        index += 1
        long = size > LONG
        yield (map(records.__getitem__, range(first, index)) if long else [*pieces, piece]), long


def _parts(encoded: Encoded) -> Iterator[Encoded]:
    """A document in parts of limited length; each begins with the last token of the previous part."""
    if len(encoded.tokens) <= LONGEST:
        yield encoded
        return
    for start in range(0, len(encoded.tokens) - 1, LONGEST):
        stop = min(start + LONGEST, len(encoded.tokens) - 1)
        learnt = learnt_runs(encoded.weights[start:stop] > 0)
        yield Encoded(encoded.tokens[start : stop + 1], learnt, encoded.last and stop == len(encoded.tokens) - 1)


# ---- In a separate process -------------------------------------------------------------------------------------------

JOB, TOKENIZER = "job.json", "tokenizer"


def save_job(directory: epath.Path, job: Job, tokenizer: Tokenizer) -> None:
    """Write the inputs of a process."""
    tokenizer.save(directory / TOKENIZER)
    settings: Any = getattr(tokenizer, "settings", None) or TOKENIZERS.find(tokenizer.kind)()
    content = {"job": dataclasses.asdict(job), "kind": settings.kind, "settings": dataclasses.asdict(settings)}
    (directory / JOB).write_text(json.dumps(content))


@functools.lru_cache(2)
def _load_job(directory: epath.Path) -> tuple[Job, Tokenizer]:
    """Read the files that `save_job` wrote."""
    content = json.loads((directory / JOB).read_text())
    kind = TOKENIZERS.find(content["kind"])(**content["settings"])
    return Job(**content["job"]), load_tokenizer(directory / TOKENIZER, kind)


@dataclasses.dataclass(frozen=True)
class WriteTokens:
    """The task (`tasks.Run`) that writes a shard of the job in a folder that all machines can access."""

    folder: str

    def __call__(self, shard: int) -> None:
        """Write the shard unless it exists."""
        job, tokenizer = _load_job(epath.Path(self.folder))
        if not job.path(shard).exists():
            write_tokens(job, tokenizer, shard, lambda done: None)


def main() -> None:
    """Write the shards whose numbers arrive on standard input, one per line, and report progress on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process receives the signal, and ends this one
    job, tokenizer = _load_job(epath.Path(sys.argv[1]))
    with contextlib.suppress(BrokenPipeError):
        for line in sys.stdin:
            try:
                write_tokens(job, tokenizer, int(line), lambda done: print(done, flush=True))
            except (UserError, OSError) as error:
                print(f"failed {json.dumps(str(error))}", flush=True)
                return
            print("written", flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # skip the interpreter's shutdown
