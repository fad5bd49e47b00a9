"""Signals that stop a run: at once if there is nothing to save, and between two steps of the training loop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

from transformer.types import Interrupted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
"""A request to end, Ctrl-C, and the end of a terminal or a connection."""


@contextlib.contextmanager
def interruptible(message: Callable[[], str]) -> Iterator[None]:
    """A context in which a signal immediately raises `Interrupted` with the message.

    Outside the main thread, the only one that receives signals, it has no effect.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, message())

    with _Handlers(stop):
        yield


class StopRequest:
    """A context in which the first signal is recorded; a second one acts as it would outside.

    Example:
        >>> with StopRequest() as stop:
        ...     stop.number
        0
    """

    def __init__(self) -> None:
        self.number = 0
        """The number of the signal; 0 without one."""
        self._handlers = _Handlers(self._handle)

    def __enter__(self) -> "StopRequest":
        self._handlers.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._handlers.restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._handlers.restore()


class _Handlers:
    """One handler for all signals within a context; the previous handlers are restored after it."""

    def __init__(self, handler: Callable[[int, FrameType | None], None]) -> None:
        self._handler = handler
        self._previous: dict[int, object] = {}

    def __enter__(self) -> None:
        # Python delivers signals to the main thread only, and only that thread can set a handler.
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            previous = signal.getsignal(number)
            # `nohup` ignores the hang-up signal, and the run continues.
            if number in (signal.SIGTERM, signal.SIGINT) or previous is not signal.SIG_IGN:
                self._previous[number] = previous
                signal.signal(number, self._handler)

    def __exit__(self, *_: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}
