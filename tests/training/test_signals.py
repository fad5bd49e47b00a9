"""A first signal is remembered, a second one acts as it would outside."""

import os
import signal
import threading

import pytest

from transformer.training.signals import SIGNALS, StopRequest, interruptible
from transformer.types import Interrupted


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_is_remembered(number):
    before = [signal.getsignal(s) for s in SIGNALS]
    with StopRequest() as stop:
        assert stop.number == 0
        os.kill(os.getpid(), number)
        assert stop.number == number
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
            seen.append(stop.number)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [0]


@pytest.mark.parametrize("number", SIGNALS)
def test_where_there_is_nothing_to_finish_a_signal_acts_at_once(number):
    before = [signal.getsignal(s) for s in SIGNALS]
    raised = pytest.raises(Interrupted, match=f"{signal.Signals(number).name}: nothing yet")
    with raised as stop, interruptible(lambda: "nothing yet"):
        os.kill(os.getpid(), number)
    assert stop.value.exit_code == 128 + number
    assert isinstance(stop.value, KeyboardInterrupt)
    assert [signal.getsignal(s) for s in SIGNALS] == before


def test_the_end_of_a_terminal_is_ignored_where_it_was():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop, interruptible(lambda: ""):
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)
