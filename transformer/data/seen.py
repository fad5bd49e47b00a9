"""Which files have been read and hashed already, so that a start need not read a text that has not changed."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from transformer.data.documents import visible_files
from transformer.storage import expand, is_local, write_whole

_SETTLED_SECONDS = 2  # a file that has just changed may change again under the same time
_FOLDER = "text_seen"


class Stamp(NamedTuple):
    """The state of the files of a source, before they are read."""

    path: epath.Path
    """Where it is noted what they hold."""
    state: str
    """A hash of their places, sizes and times; empty where these say nothing."""

    def known(self) -> str | None:
        """The fingerprint of what they hold, if they were read in this state."""
        try:
            noted = json.loads(self.path.read_text())
            return str(noted["fingerprint"]) if self.state and noted["state"] == self.state else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def note(self, fingerprint: str) -> None:
        """Keep what they hold. Where nothing can be written, they are read again the next time."""
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

    Sizes and times stand for the content only to spare the reading. A change of the content changes the time of the inode
    (ctime), which no program sets.

    Args:
        name: of the source.
        reading: whatever else decides what is read of it.
        data_dir: where prepared datasets live.
        files: that it is of; None means the file of this name, or those of the folder. Of none, nothing is known.
    """
    path = os.path.abspath(expand(name))
    key = hashlib.sha256(repr((path, *reading)).encode(errors="surrogateescape")).hexdigest()[:32]
    return Stamp(data_dir / _FOLDER / f"{key}.json", _state(path, files) if is_local(name) else "")


def joined(stamps: Sequence[Stamp]) -> Stamp:
    """Of several names that are read together."""
    if len(stamps) == 1:
        return stamps[0]
    places, states = [stamp.path.name for stamp in stamps], [stamp.state for stamp in stamps]
    key, state = (hashlib.sha256(repr(parts).encode()).hexdigest() for parts in (places, states))
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
