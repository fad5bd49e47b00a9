"""Asking a run to stop: SIGTERM and SIGINT set a flag that the loop reads between two steps."""

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """A context in which the first SIGTERM or SIGINT is remembered and a second one acts as it would outside.

    Example:
        >>> with StopRequest() as stop:
        ...     bool(stop)
        False
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._previous: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.signal_name != ""

    def __enter__(self) -> "StopRequest":
        # Python delivers signals to the main thread only, and lets no other set a handler.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}
