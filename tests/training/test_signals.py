"""A first signal is remembered, a second one acts as it would outside."""

import os
import signal
import threading

import pytest

from transformer.training.signals import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_is_remembered(number):
    before = [signal.getsignal(s) for s in SIGNALS]
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal_name == signal.Signals(number).name
    assert [signal.getsignal(s) for s in SIGNALS] == before


@pytest.mark.usefixtures("interruptible")
def test_second_signal_acts_as_outside():
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_come_back_after_an_error():
    before = [signal.getsignal(s) for s in SIGNALS]
    with pytest.raises(ZeroDivisionError), StopRequest():
        _ = 1 / 0
    assert [signal.getsignal(s) for s in SIGNALS] == before


def test_outside_the_main_thread_nothing_is_handled():
    seen = []

    def run():
        with StopRequest() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]
