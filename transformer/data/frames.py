"""Readers of bzip2, xz and zstd data with one or more frames; zstd needs the `zstandard` package (extra `formats`)."""

import bz2
import io
import lzma
from collections.abc import Callable
from typing import Any, BinaryIO

from transformer.validation import counted, require_installed

try:
    import zstandard
except ImportError:
    zstandard = None

_PIECE = 1 << 17  # compressed bytes read at a time
_MOST = 1 << 20  # bytes unpacked at a time, where the library has a limit
_DAMAGE: tuple[type[Exception], ...] = (OSError, lzma.LZMAError, *([zstandard.ZstdError] if zstandard else []))


def open_bzip2(file: BinaryIO) -> io.BufferedReader:
    """The decompressed content of a bzip2 file, as `open_zstd`."""
    return io.BufferedReader(_Frames(file, bz2.BZ2Decompressor, (_MOST,)))


def open_xz(file: BinaryIO) -> io.BufferedReader:
    """The decompressed content of an xz file, as `open_zstd`."""
    return io.BufferedReader(_Frames(file, lzma.LZMADecompressor, (_MOST,)))


def open_zstd(file: BinaryIO) -> io.BufferedReader:
    """The decompressed content of a zstd file; it can be read again from the start, for example after `seek(0)`.

    Args:
        file: a file in binary mode, at its start.

    Raises:
        UserError: the package is not installed.
    """
    require_installed(zstandard, "zstandard", "formats")
    assert zstandard is not None
    decompressor = zstandard.ZstdDecompressor
    return io.BufferedReader(_Frames(file, lambda: decompressor().decompressobj(), ()))


class _Frames(io.RawIOBase):
    """A reader that reports truncation, damage and trailing data.

    The libraries' own readers end silently in some of these cases, and the text after that would be lost. The reader of zstd
    ends within a frame. The readers of bzip2 and xz end at a frame whose first bytes are damaged.
    """

    def __init__(self, file: Any, begin: Callable[[], Any], limit: tuple[int, ...]) -> None:
        self._file, self._begin, self._limit = file, begin, limit
        self._restart()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset from the start or from the current one; earlier data are decompressed, again if necessary."""
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the length of compressed data is not known before they are unpacked")
        target = offset + self._place * (whence == io.SEEK_CUR)
        if target < self._place:
            self._restart()
        while self._place < target and self.read(min(_PIECE, target - self._place)):
            pass
        return self._place

    def _restart(self) -> None:
        self._file.seek(0)
        self._place, self._frames, self._rest, self._ready, self._frame = 0, 0, b"", memoryview(b""), None

    def readinto(self, buffer: Any) -> int:
        """Raises EOFError if data end within a frame, and OSError if they are damaged or followed by other data."""
        while not self._ready:
            has_more = self._frame is not None and not getattr(self._frame, "needs_input", True)
            piece = b"" if has_more else self._piece()
            if not piece and not has_more:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._ready = memoryview(self._unpacked(piece))
        count = min(len(self._ready), len(buffer))
        buffer[:count] = self._ready[:count]
        self._ready, self._place = self._ready[count:], self._place + count
        return count

    def _piece(self) -> bytes:
        """The next compressed bytes, empty at the end; zero bytes after a frame are padding."""
        piece, self._rest = self._rest or self._file.read(_PIECE), b""
        while piece and self._frame is None and self._frames:
            if unpadded := piece.lstrip(b"\0"):
                return unpadded
            piece = self._file.read(_PIECE)
        return piece

    def _unpacked(self, piece: bytes) -> bytes:
        self._frame = self._frame or self._begin()
        try:
            unpacked: bytes = self._frame.decompress(piece, *self._limit)
        except _DAMAGE as error:
            after = f" (after {counted(self._frames, 'whole part')})" if self._frames else ""
            raise OSError(f"{str(error).rstrip('.')}{after}") from None
        self._rest = self._frame.unused_data if self._frame.eof else b""
        self._frames += self._frame.eof
        self._frame = None if self._frame.eof else self._frame
        return unpacked
