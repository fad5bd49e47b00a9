"""Texts of files; a long text stays in its file and is read piece by piece."""

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from transformer.data.files import decode_part, open_file, refuse_other
from transformer.types import UserError

LONG = 32 << 20
"""Size in bytes of the longest text held in memory."""
_CHUNK = 8 << 20


class LongText:
    """Bytes `start` to `stop` of a file, decompressed and without a byte order mark; usable like a `str` where documents need it.

    Raises:
        UserError: on reading, if the bytes are not UTF-8 text, or the file has changed since this object was made.
    """

    def __init__(self, path: epath.Path, start: int, stop: int) -> None:
        self.path, self.start, self.stop = path, start, stop
        self._state = _state(path)

    @property
    def num_bytes(self) -> int:
        """Its length."""
        return self.stop - self.start

    def chunks(self) -> Iterator[bytes]:
        """The text in pieces of some megabytes that end between characters."""
        self._refuse_changed()
        rest, left = b"", self.num_bytes
        with open_file(self.path) as file:
            file.seek(self.start, os.SEEK_CUR)
            while left > 0 and (read := file.read(min(_CHUNK, left))):
                left -= len(read)
                data = rest + read
                stop = _character_of(data, len(data) - 1) if left > 0 else len(data)
                decode_part(data[:stop], str(self.path), self.stop - left - len(data))
                yield data[:stop]
                rest = data[stop:]
        self._refuse_changed(left > 0)

    def parts(self, sizes: Sequence[int]) -> list["LongText"]:
        """Consecutive parts of about these sizes in bytes, cut between characters; the last one has all remaining bytes."""
        starts = []
        for position in itertools.accumulate(sizes[:-1], initial=self.start):
            before = max(self.start, position - 3)
            with open_file(self.path) as file:
                file.seek(before, os.SEEK_CUR)
                data = file.read(min(position + 1, self.stop) - before)
            starts.append(before + _character_of(data, position - before))
        ends = [*starts[1:], self.stop]
        return [LongText(self.path, start, stop) for start, stop in zip(starts, ends, strict=True)]

    def encode(self) -> bytes:
        """The whole text, in memory."""
        return b"".join(self.chunks())

    def isspace(self) -> bool:
        """Whether the text is white space."""
        return all(chunk.decode().isspace() for chunk in self.chunks())

    def removeprefix(self, prefix: str) -> "LongText":
        """The text without the prefix, if it has the prefix."""
        begins = next(self.chunks(), b"").startswith(prefix.encode())
        return LongText(self.path, self.start + len(prefix.encode()) * begins, self.stop)

    def _refuse_changed(self, short: bool = False) -> None:
        if short or self._state != _state(self.path):
            raise UserError(f"A source must stay as it is while it is read, {self.path} changed; start again.")


Text = str | LongText


def num_bytes(text: Text) -> int:
    """The length of a text in UTF-8."""
    return text.num_bytes if isinstance(text, LongText) else len(text.encode())


def chunks(text: Text) -> Iterator[bytes]:
    """A text in pieces that end between characters."""
    return text.chunks() if isinstance(text, LongText) else iter((text.encode(),))


def file_texts(path: epath.Path, separator: str) -> Iterator[Text]:
    """The text of a file, or its parts between separators.

    Raises:
        UserError: it is not UTF-8 text; in a long part, this is found when the part is read.
    """
    mark, data = separator.encode(), b""
    start = position = 0  # starts of the part and of `data`; they differ once the part is too long
    with open_file(path) as file:
        while chunk := file.read(_CHUNK):
            if not position and not data:
                refuse_other(chunk, str(path))
            data += chunk
            *ended, data = data.split(mark) if mark else [data]
            for part in ended:
                yield _text(path, start, position, part)
                start = position = position + len(part) + len(mark)
            if len(data) > LONG or position > start:
                gone = (
                    max(0, len(data) + 1 - len(mark)) if mark else len(data)
                )  # keep the possible start of a separator
                position, data = position + gone, data[gone:]
        yield _text(path, start, position, data)


def _text(path: epath.Path, start: int, position: int, data: bytes) -> Text:
    if position == start:
        return decode_part(data, str(path), start)
    return LongText(path, start, position + len(data))


def _character_of(data: bytes, position: int) -> int:
    """The start of the character that contains a byte."""
    start = position
    while max(0, position - 3) < start < len(data) and data[start] & 0xC0 == 0x80:
        start -= 1
    return start


def _state(path: epath.Path) -> Any:
    of = path.stat()
    return of.length, of.mtime
