"""A record of the files that were read and hashed, which spares a start the reading of unchanged text."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from transformer.data.documents import visible_files
from transformer.storage import expand, is_local, write_whole

_SETTLED_SECONDS = 2  # a file changed more recently may change again without a new time stamp
_FOLDER = "text_seen"


class Stamp(NamedTuple):
    """The state of a source's files before they are read."""

    path: epath.Path
    """The file that stores their fingerprint."""
    state: str
    """A hash of their paths, sizes and times; empty if these do not determine the content."""

    def known(self) -> str | None:
        """The fingerprint of the content, if the files were read in this state."""
        try:
            noted = json.loads(self.path.read_text())
            return str(noted["fingerprint"]) if self.state and noted["state"] == self.state else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def note(self, fingerprint: str) -> None:
        """Store the fingerprint of the content. If nothing can be written, the files are read again the next time."""
        try:
            if self.state and self.known() != fingerprint:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self.path, json.dumps({"state": self.state, "fingerprint": fingerprint}))
        except OSError:
            pass


def stamp(
    name: str, reading: Sequence[object], data_dir: epath.Path, files: Sequence[epath.Path] | None = None
) -> Stamp:
    """The state of a file or folder.

    Sizes and times replace the content only to avoid reading it. Every change of the content changes the inode's time (ctime),
    which no program can set.

    Args:
        name: the name of the source.
        reading: all other settings that affect the content read.
        data_dir: the directory of prepared datasets.
        files: the files of the source. None means the file with this name, or the files of the folder; an empty list means that
            the files are unknown.
    """
    path = os.path.abspath(expand(name))
    key = hashlib.sha256(repr((path, *reading)).encode(errors="surrogateescape")).hexdigest()[:32]
    return Stamp(data_dir / _FOLDER / f"{key}.json", _state(path, files) if is_local(name) else "")


def joined(stamps: Sequence[Stamp]) -> Stamp:
    """The joint state of several names that are read together."""
    if len(stamps) == 1:
        return stamps[0]
    paths, states = [stamp.path.name for stamp in stamps], [stamp.state for stamp in stamps]
    key, state = (hashlib.sha256(repr(parts).encode()).hexdigest() for parts in (paths, states))
    return Stamp(stamps[0].path.parent / f"{key[:32]}.json", state if all(states) else "")


def _state(path: str, files: Sequence[epath.Path] | None) -> str:
    state, newest = hashlib.sha256(), 0.0
    try:
        if files is None:
            files = visible_files(epath.Path(path)) if os.path.isdir(path) else [epath.Path(path)]
        if not files:
            return ""
        for file in files:
            of = os.stat(file)
            newest = max(newest, of.st_mtime, of.st_ctime)
            state.update(repr((os.fspath(file), of.st_size, of.st_mtime_ns, of.st_ctime_ns, of.st_ino)).encode())
    except (OSError, UnicodeEncodeError):
        return ""
    return state.hexdigest() if newest < time.time() - _SETTLED_SECONDS else ""
