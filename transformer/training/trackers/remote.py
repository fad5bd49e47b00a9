"""Sends a run's rows to one run of a tracker, across restarts, each row once."""

import contextlib
import importlib.util
import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from etils import epath

from transformer.storage import explained, write_whole
from transformer.terminal import make_console, say
from transformer.tracker import Tracker
from transformer.training.writers import Metrics
from transformer.validation import require


class RemoteTracker(Tracker):
    """A tracker whose package is the extra with its name."""

    writer: ClassVar[type["RemoteWriter"]]

    def check(self) -> None:
        """Raise UserError unless the package is installed."""
        require(
            importlib.util.find_spec(self.kind) is not None,
            f"training.trackers={self.kind} needs the package {self.kind}; in a copy of the repository: pip install -e "
            f'".[{self.kind}]".',
        )

    def open(self, workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> "RemoteWriter":
        """The writer."""
        return self.writer(workdir, config)


class RemoteWriter:
    """A writer to a tracker; a subclass begins or continues the tracker's run, sends rows, and ends.

    `tracker-NAME.json` in the run's directory has the tracker's id of the run, and the last sent step of each split. After a
    restart, repeated steps give the same rows to the bit and are not sent again. A tracker that fails gets no more rows, with a
    note. Training and the run's own files do not depend on it.
    """

    name = ""

    def __init__(self, workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
        self.workdir, self.config = epath.Path(workdir), config
        self._path = self.workdir / f"tracker-{self.name}.json"
        self._id, self._sent, self._open = "", dict[str, int](), False

    def begin(self, run_id: str) -> str:
        """Begin a run, or continue the run with this id if the id is not empty; return its id."""
        raise NotImplementedError

    def send(self, step: int, split: str, metrics: Metrics) -> None:
        """Send one row."""
        raise NotImplementedError

    def end(self) -> None:
        """End the sending of rows in this process."""
        raise NotImplementedError

    def resume(self, step: int) -> None:
        """Continue the tracker's run; sent rows are neither removed nor sent again."""
        del step
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(self._path.read_bytes())
            self._id, self._sent = str(kept["id"]), {str(name): int(last) for name, last in kept["sent"].items()}
        with self._noted():
            self._id, self._open = self.begin(self._id), True
            self._keep()

    def write(self, step: int, split: str, metrics: Metrics) -> None:
        """Send a row that was not sent before."""
        if not self._open or step <= self._sent.get(split, -1):
            return
        with self._noted():
            self.send(step, split, metrics)
            self._sent[split] = step
            self._keep()

    def close(self) -> None:
        """End."""
        if self._open:
            self._open = False
            with self._noted():
                self.end()

    def _keep(self) -> None:
        with explained(f"{self._path}"):
            write_whole(self._path, json.dumps({"id": self._id, "sent": self._sent}))

    @contextlib.contextmanager
    def _noted(self) -> Any:
        try:
            yield
        except Exception as error:
            self._open = False
            text = str(error).strip().partition("\n")[0] or type(error).__name__
            say(make_console(), f"{self.name} failed, and gets no more rows from this start: {text:.300}")
