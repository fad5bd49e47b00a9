"""Token files of other programs: their headers, the ids of several files as one stream, and its documents."""

import array
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int, Integer

from transformer.data.encoded import Encoded
from transformer.data.files import refuse_dangling
from transformer.data.identity import ContentHash
from transformer.data.progress import progress
from transformer.data.tokenizers import Tokenizer
from transformer.data.tokens import Tokens
from transformer.storage import is_file, is_local, writing_whole
from transformer.tokenizer import around_text, document_start
from transformer.types import UserError
from transformer.validation import require

_HEADER = 256  # 32-bit numbers: a magic number, a version, the number of ids, and zeros
_FORMATS = {20240520: (1, np.dtype("<u2"), "GPT-2"), 20240801: (7, np.dtype("<u4"), "Llama 3")}
_QUESTIONS = 20240522
_PLAIN = np.dtype("<u2")
_UPPER = 3  # largest upper half of a 32-bit id; vocabularies have fewer than 4 * 2^16 entries
_FEWEST = 64  # 16-bit numbers that show the size of ids
_BLOCK = 1 << 23  # ids in memory at a time
_INDEX_FORMAT = 1


class TokenFile(NamedTuple):
    """A file of ids."""

    path: epath.Path
    dtype: np.dtype
    start: int
    """Bytes before the first id."""
    num_ids: int


def read_header(path: epath.Path) -> TokenFile:
    """The description of a file: llm.c and modded-nanoGPT begin with 256 numbers, nanoGPT with the first id.

    Raises:
        UserError: the file is not a token file, or incomplete.
    """
    refuse_dangling(path)
    require(is_file(path), f"A file of ids must exist, {path} does not, or is a folder, a pipe or a device.")
    size = path.stat().length
    with path.open("rb") as file:
        begin = file.read(4 * _HEADER)
    header = np.frombuffer(begin, "<i4", count=len(begin) // 4)
    if len(header) < _HEADER or (header[3:] != 0).any():
        known = header[0] in (*_FORMATS, _QUESTIONS) if len(header) else False
        require(
            not known, f"A header of {_HEADER} numbers must be whole, {path} has {size:,} bytes: copy the file again."
        )
        _refuse_wide(begin, path)
        found = TokenFile(path, _PLAIN, 0, size // _PLAIN.itemsize)
    else:
        found = _described(path, *map(int, header[:3]))
    expected = found.start + found.num_ids * found.dtype.itemsize
    require(
        size == expected,
        f"A file of ids must be whole, {path} has {size:,} bytes and should have {expected:,}, for {found.num_ids:,} ids of "
        f"{found.dtype.itemsize} bytes" + (" after the header" if found.start else "") + ": copy or make it again.",
    )
    require(found.num_ids > 0, f"A file of ids must have some, {path} has none.")
    return found


def _refuse_wide(begin: bytes, path: epath.Path) -> None:
    """Refuse 32-bit ids without a header: read as 16-bit ids, every second one would be the upper half of an id."""
    numbers = np.frombuffer(begin, _PLAIN, count=len(begin) // 4 * 2)
    wide = len(numbers) >= _FEWEST and numbers[1::2].max() <= _UPPER < numbers[::2].max()
    require(
        not wide,
        f"A file of ids without a header must have 16-bit ids, {path} begins with 32-bit ids: write them as 16-bit ids, or put "
        "llm.c's header for 32-bit ids before them (20240801, version 7).",
    )


def _described(path: epath.Path, magic: int, version: int, count: int) -> TokenFile:
    require(magic != _QUESTIONS, f"A file of ids must be of running text, {path} is of llm.c's questions with answers.")
    known = ", ".join(f"{number} (version {of[0]}, {of[2]})" for number, of in _FORMATS.items())
    require(
        magic in _FORMATS and version == _FORMATS[magic][0],
        f"The header of a file of ids must begin with {known}, {path} has {magic} and version {version}; a file without a "
        "header is read as 16-bit ids.",
    )
    return TokenFile(path, _FORMATS[magic][1], 4 * _HEADER, max(0, count))


class TokenStream:
    """The ids of files, one file after the other. Local files are memory-mapped; of remote files, only requested ids are read."""

    def __init__(self, paths: Sequence[epath.Path]) -> None:
        self.files = [read_header(path) for path in paths]
        self.dtype = self.files[0].dtype
        other = next((file for file in self.files if file.dtype != self.dtype), None)
        require(
            other is None,
            f"Files of one stream must have ids of one size, {self.files[0].path} has {self.dtype.itemsize} bytes each and "
            f"{other and other.path} {other and other.dtype.itemsize}; give two sources.",
        )
        self.starts = np.cumsum([0, *(file.num_ids for file in self.files)])
        self._mapped: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> Integer[np.ndarray, " n"]:
        """The ids in a range of positions; do not write to them."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = []
        while start < stop:
            end = min(stop, int(self.starts[first + 1]))
            parts.append(self._of_file(first, start - int(self.starts[first]), end - int(self.starts[first])))
            start, first = end, first + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, self.dtype)])

    def blocks(self) -> Iterator[tuple[int, Integer[np.ndarray, " n"]]]:
        """All ids, in blocks with their start positions."""
        for start in range(0, len(self), _BLOCK):
            yield start, self.read(start, min(start + _BLOCK, len(self)))

    def location(self, index: int) -> str:
        """The file and position of an id, for messages."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return f"{self.files[number].path}, position {index - int(self.starts[number]):,}"

    def digest(self, name: str) -> str:
        """A hash of the ids, independent of their division into files."""
        content = ContentHash()
        with progress(f"ids of {name}", len(self)) as advance:
            for _, ids in self.blocks():
                content.add(np.ascontiguousarray(ids).tobytes())
                advance(len(ids))
        content.add(self.dtype.str, len(self))
        return content.hexdigest()

    def _of_file(self, number: int, start: int, stop: int) -> Integer[np.ndarray, " n"]:
        file = self.files[number]
        if not is_local(file.path):
            with file.path.open("rb") as remote:
                remote.seek(file.start + start * self.dtype.itemsize)
                return np.frombuffer(remote.read((stop - start) * self.dtype.itemsize), self.dtype)
        if number not in self._mapped:
            mapped = np.memmap(file.path, self.dtype, "r", file.start, file.num_ids)
            self._mapped[number] = np.asarray(mapped)  # slices of a plain view take a fifth of the time
        return self._mapped[number][start:stop]


# ---- Documents -------------------------------------------------------------------------------------------------------


class TokenRecords(Tokens):
    """The documents of a part of a stream, long ones in pieces, encoded as the tokenizer would encode their text."""

    def __init__(self, stream: TokenStream, pairs: Int[np.ndarray, "n 2"], tokenizer: Tokenizer) -> None:
        self._stream, self._pairs = stream, pairs
        self._start, self._end = document_start(tokenizer), tokenizer.end_of_text
        self._closed = all(around_text(tokenizer))

    def __len__(self) -> int:
        return len(self._pairs)

    def _read(self, index: int) -> Encoded:
        near = self._pairs[max(0, index - 1) : index + 2].tolist()
        own = min(index, 1)
        start, stop = near[own]
        continues = own > 0 and near[0][1] == start  # false if an id without text separates the two
        last = own + 1 == len(near) or near[own + 1][0] != stop
        after = last and stop < len(self._stream)
        ids = self._stream.read(max(0, start - 1), stop + after)
        begun = start > 0 and (continues or ids[0] == self._start)
        if begun and not self._closed and (not last or (after and ids[-1] == self._end)):
            return Encoded(ids, _ALL, last)
        body = ids[start > 0 : len(ids) - after]
        first = int(ids[0]) if continues else self._start
        end = [self._end] * (last + (last and self._closed))
        tokens = np.concatenate([np.array([first], np.int32), body, np.array(end, np.int32)]).astype(np.int32)
        learnt = np.array([0, len(tokens) - 2, 1], np.uint32) if last and self._closed else _ALL
        return Encoded(tokens, learnt, last)

    def sizes(self) -> np.ndarray:
        """The number of targets of each record."""
        starts, stops = self._pairs.T
        last = np.append(starts[1:] != stops[:-1], True)
        return (stops - starts + last * (1 + self._closed)).astype(np.uint32)


_ALL = np.zeros(0, np.uint32)


class Part(NamedTuple):
    """A split: a part of a stream."""

    stream: TokenStream
    start: int
    stop: int
    digest: str
    """A hash of the whole stream."""

    def records(self, tokenizer: Tokenizer, longest: int, folder: epath.Path) -> TokenRecords:
        """The documents of the part for a tokenizer; their positions are stored below `folder`.

        Raises:
            UserError: the tokenizer lacks one of the ids, or there is no text.
        """
        between = sorted({document_start(tokenizer), tokenizer.end_of_text})
        content = ContentHash()
        content.add(_INDEX_FORMAT, self.digest, self.start, self.stop, longest, *between)
        path = folder / f"{content.hexdigest()[:32]}.int64"
        noted = _noted(path)
        if noted is None:
            noted = self._found(between, longest)
            _note(path, noted)
        pairs, largest = noted[:-1], int(noted[-1, 0])
        self._refuse_unknown(largest, tokenizer.vocab_size)
        require(len(pairs) > 0, f"A source must hold text, {self.stream.files[0].path} has ids between documents only.")
        return TokenRecords(self.stream, pairs, tokenizer)

    def _found(self, between: Sequence[int], longest: int) -> Int[np.ndarray, "n 2"]:
        """Start and stop of each record; the last row is the largest id and the number of ids."""
        positions, largest = array.array("q", [self.start - 1]), 0
        with progress(f"documents of {self.stream.files[0].path.name}", self.stop - self.start) as advance:
            for start, ids in self.stream.blocks():
                ids = ids[max(0, self.start - start) : max(0, self.stop - start)]
                if len(ids):
                    found = functools.reduce(np.logical_or, (ids == index for index in between))
                    positions.frombytes((np.flatnonzero(found) + max(start, self.start)).astype(np.int64).tobytes())
                    largest = max(largest, int(ids.max()))
                    advance(len(ids))
        ends = np.append(np.frombuffer(positions, np.int64), self.stop)
        starts, stops = ends[:-1] + 1, ends[1:]
        starts, stops = starts[starts < stops], stops[starts < stops]
        counts = -(-(stops - starts) // longest)
        piece = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(starts, counts) + piece * longest
        pairs = np.stack([starts, np.minimum(starts + longest, np.repeat(stops, counts))], axis=1)
        return np.concatenate([pairs, [[largest, self.stop - self.start]]])

    def _refuse_unknown(self, largest: int, vocab_size: int) -> None:
        if largest < vocab_size:
            return
        for start, ids in self.stream.blocks():
            unknown = np.flatnonzero(ids >= vocab_size)
            unknown = unknown[(unknown + start >= self.start) & (unknown + start < self.stop)]
            if len(unknown):
                first = int(unknown[0])
                raise UserError(
                    f"A file of ids must be read with the tokenizer that made it, {self.stream.location(start + first)} has the "
                    f"id {int(ids[first])} and the tokenizer {vocab_size:,} ids. Give its folder (data.tokenizer.folder), start "
                    "from a model that has it (training.init_from), or read ids alone (data.tokenizer.kind=ids)."
                )


def _noted(path: epath.Path) -> Int[np.ndarray, "n 2"] | None:
    try:
        found = np.memmap(path, "<i8", "r") if is_local(path) else np.frombuffer(path.read_bytes(), "<i8")
        return np.asarray(found).reshape(-1, 2)
    except (OSError, ValueError):  # missing or truncated
        return None


def _note(path: epath.Path, pairs: Int[np.ndarray, "n 2"]) -> None:
    """Store the positions of documents. If nothing can be written, they are found again the next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing_whole(path) as file:
            file.write(pairs.astype("<i8").tobytes())
    except OSError:
        pass
