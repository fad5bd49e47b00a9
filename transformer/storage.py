"""Paths from users, files that are either whole or absent, and explanations of failed writes."""

import contextlib
import errno
import io
import os
import re
from collections.abc import Iterator
from typing import IO

from etils import epath

from transformer.types import UserError
from transformer.validation import require


class WriteError(UserError):
    """A file could not be written; the message has the cause and the remedy."""


ASIDE = ".tmp"
"""Suffix of a file that is being written; after a kill, a file with this suffix may be removed."""

_ERRNO = re.compile(r"os_error_code='(\d+)'|\[OS error (\d+)|\[Errno (\d+)\]")
_CAUSES: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", "Free some space"),
    errno.EDQUOT: ("the disk quota is used up", "Free some of it, or ask for more"),
    errno.EROFS: ("the file system is read-only", "Make it writable"),
    errno.EACCES: ("there is no permission to write", "Change the permissions"),
    errno.EPERM: ("writing is not permitted", "Change the permissions"),
    errno.ENOENT: ("the folder is gone", "Put it back, or mount it again"),
    errno.ENOTDIR: ("a part of its path is a file, not a folder", "Move that file"),
    errno.EISDIR: ("there is a folder of that name", "Move that folder"),
    errno.EEXIST: ("there is a file of that name", "Move that file"),
    errno.ESTALE: ("the network file system is gone", "Mount it again"),
    errno.ENOTCONN: ("the network file system is gone", "Mount it again"),
    errno.ETIMEDOUT: ("the network file system does not answer", "Wait until it does"),
    errno.ENODEV: ("the disk is gone", "Connect it again"),
    errno.ENXIO: ("the disk is gone", "Connect it again"),
    errno.EIO: ("the disk reports an error", "Check the disk"),
    errno.EFBIG: ("the file would be larger than allowed", "Raise the limit (ulimit -f)"),
    errno.EMFILE: ("too many files are open", "Raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many files are open", "Close other programs"),
    errno.ENAMETOOLONG: ("the path is too long", "Choose a shorter one"),
}


def expand(path: str | os.PathLike[str]) -> str:
    """A path from a user, with `~` and `~NAME` as home directories; every such path passes through here.

    Raises:
        UserError: it is empty or blank (which would mean the current folder), or no system supports it.

    Example:
        >>> expand("gs://bucket/run")
        'gs://bucket/run'
    """
    name = os.fspath(path)
    require(name.strip() != "", f"A path must not be empty, got {name!r}; the current folder is called '.'.")
    parts = name.encode(errors="replace").split(b"/")
    valid = "\0" not in name and max(map(len, parts)) < 256 and sum(map(len, parts)) + len(parts) <= 4096
    require(valid, f"A path must be without NUL, its names of at most 255 bytes and itself of 4,095, got {name!r:.80}.")
    try:
        epath.Path(name)
    except KeyError:
        raise UserError(
            f"An address must begin with gs://, s3:// or az://, got {name!r:.80}: fetch the file, and give its path."
        ) from None
    return os.path.expanduser(name)


def resolved(path: epath.PathLike) -> epath.Path:
    """A path from a user, absolute and without links; an address in a bucket is unchanged.

    (`epath`'s own `resolve` takes an address for a relative path.)
    """
    path = expand(path)
    return epath.Path(path).resolve() if is_local(path) else epath.Path(path)


def is_local(path: epath.PathLike) -> bool:
    """Whether a path is in this machine's file system (network mounts included), not in a bucket."""
    return "://" not in os.fspath(path)


def is_file(path: epath.PathLike) -> bool:
    """Whether there is a file, or a link to one: not a folder, and not a pipe or device, which `epath` takes for files."""
    return os.path.isfile(path) if is_local(path) else epath.Path(path).is_file()


@contextlib.contextmanager
def writing_whole(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """A file to be written in parts. It appears when the block has ended, and not if the block fails or is interrupted.

    Raises:
        OSError: it cannot be written.
    """
    path = epath.Path(path)
    if not is_local(path):
        whole = io.BytesIO()
        yield whole
        path.write_bytes(whole.getvalue())
        return
    aside = path.parent / f"{path.name}{ASIDE}"
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except (Exception, KeyboardInterrupt):
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Write a temporary file to the disk, then rename it: a reader finds the old or the new file, even after a power cut.

    Only one writer of a file may be active at a time. In a bucket, an object appears whole by itself.

    Raises:
        OSError: it cannot be written; the old file stays, and no temporary file remains.
    """
    with writing_whole(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_directory(path: epath.PathLike) -> None:
    """Flush the names in a local directory to the disk, if its file system supports that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(os.fspath(path), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def explain(error: BaseException, what: str, done: str = "written") -> WriteError | None:
    """An error for a failed write of `what`, with cause, path and remedy; None if the failure was of another kind.

    `done` is the operation that failed; "read or written" if it may have been either.

    Takes an `OSError`, an error of TensorStore or Orbax that contains one, or an exception raised from either.

    Example:
        >>> print(explain(OSError(28, "No space left on device", "runs/a/7"), "Checkpoint 7"))
        Checkpoint 7 could not be written: the disk is full (runs/a/7). Free some space, then start the same command again.
    """
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, UserError):
        number = _number(seen)
        if number is not None:
            cause, remedy = _CAUSES.get(number, (f"{seen}".splitlines()[0] if f"{seen}" else "it failed", "Mend that"))
            name = getattr(seen, "filename", None)
            where = f" ({name})" if name and number in _CAUSES else ""
            return WriteError(
                f"{what} could not be {done}: {cause}{where}. {remedy}, then start the same command again."
            )
        seen = seen.__cause__
    return None


def _number(error: BaseException) -> int | None:
    """The operating system's error number, 0 for an `OSError` without one; None for other errors."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = _ERRNO.search(str(error))
    return int(next(filter(None, found.groups()))) if found else 0 if isinstance(error, OSError) else None


@contextlib.contextmanager
def understood(what: str) -> Iterator[None]:
    """Turn any error while the content of a file is interpreted into a `UserError` that names it.

    Example:
        `with understood(f"{path}"): tokenizer = make(json.loads(text))`
    """
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{what} must be as this library writes it, but is damaged ({cause:.200}); put a copy back."
        ) from error


@contextlib.contextmanager
def explained(what: str, done: str = "written") -> Iterator[None]:
    """Turn a failed write (or another operation `done`) in the block into the `WriteError` of `explain`; others pass through.

    Example:
        `with explained(f"{path}"): write_whole(path, text)`
    """
    try:
        yield
    except Exception as error:
        told = explain(error, what, done)
        if told is None:
            raise
        raise told from error
