"""One active run per directory: a lock that ends with the process that holds it."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator

from etils import epath

from transformer.storage import explain, is_local
from transformer.types import UserError

LOCK_FILE = "run.lock"
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def locked(workdir: epath.PathLike, report: Callable[[str], object]) -> Iterator[None]:
    """Lock `workdir` for this process and this run; the directory is created, and removed if it stays empty.

    An advisory lock (`flock`) on an open file: the operating system releases it whenever the process ends, and network file
    systems share it between hosts. In a bucket, or a file system that does not share it, this is reported and the run continues.

    Args:
        workdir: the run's directory.
        report: receives a sentence for the user.

    Raises:
        UserError: another run holds the lock (the message has its process, host and start), or no file can be created there.
    """
    if not is_local(workdir):
        report(
            f"A bucket has no locks: see to it that no second run is started in {workdir} while this one is at work."
        )
        yield
        return
    directory = pathlib.Path(os.path.abspath(workdir))
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    path = directory / LOCK_FILE
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _take(path, report)
    except OSError as error:
        explained = explain(error, str(path))
        raise explained if explained else error from error
    try:
        yield
    finally:
        # Only a run that holds the lock removes the file; a process that opened it meanwhile notices (`_take`).
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)
        with contextlib.suppress(OSError):
            for empty in made:
                empty.rmdir()


def _take(path: pathlib.Path, report: Callable[[str], object]) -> int:
    """The descriptor of the lock file, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
                os.close(descriptor)  # the previous holder has just removed the file
                continue
            reaches = _reaches_other_hosts(path.parent)
        except OSError as error:
            if error.errno in _HELD:
                holder = _holder(path)
                os.close(descriptor)
                raise UserError(
                    f"Only one run may be at work in a directory, {path.parent} is in use by {holder}. Wait until it has "
                    "ended, or choose another workdir. Nothing was changed."
                ) from None
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            reaches = False
        if not reaches:
            report(
                f"The file system of {path.parent} keeps no locks between hosts: see to it that no second run is started there "
                "from another one while this run is at work."
            )
        text = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(text) + "\n").encode(), 0)
        return descriptor


def _holder(path: pathlib.Path) -> str:
    """The holder of the lock, as recorded in the file."""
    try:
        text = json.loads(path.read_text())
        return f"process {text['process']} on {text['host']}, since {text['since']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process, which has just begun"


def _reaches_other_hosts(directory: pathlib.Path) -> bool:
    """False if the mount is known to be shared and to keep its locks on this host (nfs(5), mount.lustre(8), fuse(8))."""
    try:
        mounts = [line.split()[1:4] for line in pathlib.Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return True
    parents = {str(path) for path in (directory, *directory.parents)}
    # Of the longest matches, the last: a mount hides earlier ones.
    _, _, kind, options = max(
        ((len(point), index, kind, options) for index, (point, kind, options) in enumerate(mounts) if point in parents),
        default=(0, 0, "", ""),
    )
    local = {"nolock", "local_lock=all", "local_lock=flock", "localflock", "noflock"}
    return not kind.startswith("fuse.") and not local & set(options.split(","))
