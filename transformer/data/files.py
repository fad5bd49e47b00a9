"""Text files on disk: UTF-8, plain or compressed with gzip, bzip2, xz or zstd; other content is refused."""

import codecs
import contextlib
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from transformer.data.frames import open_bzip2, open_xz, open_zstd
from transformer.storage import expand, is_file, is_local
from transformer.types import UserError
from transformer.validation import require

_OPENERS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": open_bzip2,
    b"\xfd7zXZ": open_xz,
    b"\x28\xb5\x2f\xfd": open_zstd,
}
_REFUSED = {b"PK\x03\x04": "zip"}
_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
STANDARD_INPUT = "<standard input>"
"""The name of a source from standard input, which can be read only once; a suffix gives its kind."""


@contextlib.contextmanager
def open_file(path: epath.Path) -> Iterator[Any]:
    """The bytes of a file, decompressed (detected by content, not by name), without the byte order mark of UTF-8.

    Raises:
        UserError: it is not a file (other things may have no end, or be readable only once); or on reading, if compressed data
            are truncated or damaged.
    """
    if os.fspath(path).startswith(STANDARD_INPUT):
        yield io.BytesIO(sys.stdin.buffer.read().removeprefix(codecs.BOM_UTF8))
        return
    refuse_dangling(path)
    require(
        is_file(path) or not path.exists(),
        f"What is read must be a file, {path} is a folder, a pipe or a device: save it as a file.",
    )
    try:
        with path.open("rb") as file:
            start = file.read(8)
            file.seek(0)
            opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)
            with contextlib.nullcontext(file) if opener is None else opener(file) as unpacked:
                if unpacked.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                    unpacked.seek(0)
                yield unpacked
    except (EOFError, zlib.error, OSError) as error:
        if getattr(error, "errno", None):  # an error of the operating system; bzip2 and gzip set no number
            raise
        raise UserError(f"A compressed file must be whole, {path} is not: {error}. Fetch it again.") from None


def is_there(name: str) -> bool:
    """Whether a source is an existing file or folder."""
    return name.startswith(STANDARD_INPUT) or epath.Path(expand(name)).exists()


def refuse_dangling(path: epath.Path) -> None:
    """Refuse a broken link: without the error, a corpus would be smaller than its folder suggests."""
    dangling = is_local(path) and os.path.islink(path) and not os.path.exists(path)
    require(
        not dangling,
        f"What is read must exist, {path} is a link to {os.readlink(path) if dangling else ''}, which does not: remove the link, "
        "or put back what it names.",
    )


def read_file(path: epath.Path) -> bytes:
    """All bytes of a file, decompressed."""
    with open_file(path) as file:
        return file.read()


def file_lines(path: epath.Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1; only one is in memory at a time."""
    with open_file(path) as file:
        yield from enumerate(file, 1)


def kind_of(path: epath.Path) -> str:
    """The suffix of a file name before the suffix of its compression: `.jsonl` for `a.jsonl.gz`."""
    name = path.name.lower()
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return epath.Path(name).suffix


def decode_text(data: bytes, name: str) -> str:
    """UTF-8 text; other content is refused with its likely cause."""
    refuse_other(data, name)
    return decode_part(data, name)


def refuse_other(data: bytes, name: str) -> None:
    """Refuse data that begin like another kind of file, or like text in another encoding."""
    for magic, kind in _REFUSED.items():
        require(
            not data.startswith(magic), f"A text source must be UTF-8 text, {name} is {kind} data: unpack it first."
        )
    wide = _wide_encoding(data[:256])
    require(
        not wide,
        f"A text source must be UTF-8, {name} is {wide}: save it as UTF-8, or convert it with `iconv -f {wide} -t UTF-8`.",
    )


def decode_part(data: bytes, name: str, start: int = 0) -> str:
    """The text of a part of a file that starts at byte `start`."""
    zero = data.find(b"\0")
    require(
        zero < 0, f"A text source must be UTF-8 text without NUL bytes, {name} is binary (NUL at byte {start + zero})."
    )
    return decode_utf8(data, f"A text source must be UTF-8, {name}", start)


def _wide_encoding(start: bytes) -> str:
    """The encoding of text with two or four bytes per character, from its mark or its zero bytes; else empty."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    zeros = [start[offset::2].count(0) / max(1, len(start[offset::2])) for offset in (0, 1)]
    big, little = zeros[0] > 0.6 and zeros[1] == 0, zeros[1] > 0.6 and zeros[0] == 0
    return "UTF-16BE" if big else "UTF-16LE" if little else ""


def decode_utf8(data: bytes, sentence: str, start: int = 0) -> str:
    """The text of UTF-8 bytes that start at byte `start`; for other bytes the error is `sentence` followed by "is not"."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{sentence} is not (byte {start + error.start}: {data[error.start]:#04x}): convert it, for example with "
            "`iconv -f LATIN1 -t UTF-8`."
        ) from None


def json_objects(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl file, each with its location for messages; blank lines are skipped."""
    for number, line in file_lines(path):
        if not line.strip():
            continue
        location = f"{path}, line {number}"
        text = decode_text(line, location)
        try:
            record = json.loads(text.rstrip("\r\n"), object_pairs_hook=_once)
        except (
            ValueError,
            RecursionError,
        ) as error:  # not JSON, a number with thousands of digits, or unclosed brackets
            place = getattr(error, "colno", None)  # `error` itself calls the line "line 1"
            cause = f"{getattr(error, 'msg', error)}".removesuffix(" at") + (f" at character {place}" if place else "")
            raise UserError(f"Each line of a .jsonl source must be a JSON object; {location}: {cause}.") from None
        require(isinstance(record, dict), f"Each line of a .jsonl source must be a JSON object, {location} is not.")
        yield location, record


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these fields; ValueError for a repeated name, since JSON readers would keep only the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r:.80} twice")
    return fields


def without_surrogates(text: str) -> str:
    """The text with `?` instead of lone surrogates, which JSON permits and UTF-8 does not."""
    return text.encode("utf-8", "replace").decode()
