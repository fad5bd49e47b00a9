"""Reader of zstd data with one or more frames, based on the `zstandard` package (extra `formats`)."""

import io
from typing import Any, BinaryIO

from transformer.validation import require_installed

try:
    import zstandard
except ImportError:
    zstandard = None

_PIECE = 1 << 17  # compressed bytes read at a time


def open_zstd(file: BinaryIO) -> io.BufferedReader:
    """The decompressed content of a zstd file; it can be read again from the start, for example after `seek(0)`.

    Args:
        file: a file in binary mode, at its start.

    Raises:
        UserError: the package is not installed.
    """
    return io.BufferedReader(_Frames(file))


class _Frames(io.RawIOBase):
    """A reader that reports truncation; the library's own reader ends silently if data are cut off within a frame."""

    def __init__(self, file: Any) -> None:
        require_installed(zstandard, "zstandard", "formats")
        self._file = file
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
            raise io.UnsupportedOperation("the length of zstd data is not known before they are unpacked")
        target = offset + self._place * (whence == io.SEEK_CUR)
        if target < self._place:
            self._restart()
        while self._place < target and self.read(min(_PIECE, target - self._place)):
            pass
        return self._place

    def _restart(self) -> None:
        self._file.seek(0)
        self._place, self._rest, self._ready, self._frame = 0, b"", memoryview(b""), None

    def readinto(self, buffer: Any) -> int:
        """Raises EOFError if data end within a frame, and OSError if they are damaged."""
        while not self._ready:
            piece = self._rest or self._file.read(_PIECE)
            if not piece:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._ready = memoryview(self._unpacked(piece))
        count = min(len(self._ready), len(buffer))
        buffer[:count] = self._ready[:count]
        self._ready, self._place = self._ready[count:], self._place + count
        return count

    def _unpacked(self, piece: bytes) -> bytes:
        assert zstandard is not None
        try:
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            unpacked: bytes = self._frame.decompress(piece)
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from None
        self._rest = self._frame.unused_data if self._frame.eof else b""
        self._frame = None if self._frame.eof else self._frame
        return unpacked
