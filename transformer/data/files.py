"""Text files as they lie on disk: UTF-8, plain or compressed with gzip, bzip2, xz or zstd; what is no text is refused."""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import sys
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from transformer.data.zstd import open_zstd
from transformer.storage import expand, is_file, is_local
from transformer.types import UserError
from transformer.validation import require

_OPENERS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"\x28\xb5\x2f\xfd": open_zstd,
}
_REFUSED = {b"PK\x03\x04": "zip"}
_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
STANDARD_INPUT = "<standard input>"
"""With a suffix that says what it is, the name of a source that is piped in, which can be read once."""


@contextlib.contextmanager
def open_file(path: epath.Path) -> Iterator[Any]:
    """The bytes of a file, unpacked if it is compressed, whatever its name says; without the byte order mark of UTF-8.

    Raises:
        UserError: it is no file, which may have no end or come once only; or on reading, if compressed data ends too early or is
            damaged.
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
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if getattr(error, "errno", None):  # of the operating system; bzip2's and gzip's own have no number
            raise
        raise UserError(f"A compressed file must be whole, {path} is not: {error}. Fetch it again.") from None


def is_there(name: str) -> bool:
    """Whether a source can be read as a file or a folder."""
    return name.startswith(STANDARD_INPUT) or epath.Path(expand(name)).exists()


def refuse_dangling(path: epath.Path) -> None:
    """A link to what does not exist is an error: without it, a corpus would be smaller than its folder says."""
    dangling = is_local(path) and os.path.islink(path) and not os.path.exists(path)
    require(
        not dangling,
        f"What is read must exist, {path} is a link to {os.readlink(path) if dangling else ''}, which does not: remove the link, "
        "or put back what it names.",
    )


def read_file(path: epath.Path) -> bytes:
    """All bytes of a file, unpacked if it is compressed."""
    with open_file(path) as file:
        return file.read()


def file_lines(path: epath.Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1; only one is in memory at a time."""
    with open_file(path) as file:
        yield from enumerate(file, 1)


def kind_of(path: epath.Path) -> str:
    """The suffix of a file's name without that of its compression: `.jsonl` of `a.jsonl.gz`."""
    name = path.name.lower()
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return epath.Path(name).suffix


def decode_text(data: bytes, name: str) -> str:
    """UTF-8 text; what is not text is refused with its likely reason."""
    refuse_other(data, name)
    return decode_part(data, name)


def refuse_other(data: bytes, name: str) -> None:
    """What begins as other files do, or as text in another encoding."""
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
    """The text of a part of a file that begins at byte `start`."""
    zero = data.find(b"\0")
    require(
        zero < 0, f"A text source must be UTF-8 text without NUL bytes, {name} is binary (NUL at byte {start + zero})."
    )
    return decode_utf8(data, f"A text source must be UTF-8, {name}", start)


def _wide_encoding(start: bytes) -> str:
    """The encoding of text with two or four bytes a character, by its mark or by where its zeros are; else nothing."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    zeros = [start[place::2].count(0) / max(1, len(start[place::2])) for place in (0, 1)]
    big, little = zeros[0] > 0.6 and zeros[1] == 0, zeros[1] > 0.6 and zeros[0] == 0
    return "UTF-16BE" if big else "UTF-16LE" if little else ""


def decode_utf8(data: bytes, sentence: str, start: int = 0) -> str:
    """The text of bytes in UTF-8; others are refused by `sentence`, which ends before "is not". They begin at byte `start`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{sentence} is not (byte {start + error.start}: {data[error.start]:#04x}): convert it, for example with "
            "`iconv -f LATIN1 -t UTF-8`."
        ) from None


def json_objects(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl file, each with its place for messages; blank lines are passed over."""
    for number, line in file_lines(path):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        text = decode_text(line, place)
        try:
            record = json.loads(text, object_pairs_hook=_once)
        except (
            ValueError,
            RecursionError,
        ) as error:  # not JSON, a number of thousands of digits, or brackets without end
            raise UserError(f"Each line of a .jsonl source must be a JSON object; {place}: {error}.") from None
        require(isinstance(record, dict), f"Each line of a .jsonl source must be a JSON object, {place} is not.")
        yield place, record


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these fields; ValueError where two have one name, of which JSON readers keep the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r:.80} twice")
    return fields


def without_surrogates(text: str) -> str:
    """The text with `?` for lone surrogates, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()
