"""SIGTERM and SIGINT as an event, whatever the main thread is in when they come."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from megapd.interrupts import until_signalled


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_event(number):
    with until_signalled() as stop:
        os.kill(os.getpid(), number)
        assert stop.wait(10)
    assert not [thread for thread in threading.enumerate() if thread.name == "signals"]


def test_the_main_thread_may_hold_the_events_lock():
    """As inside `stop.wait`: a handler that took the lock would wait for the thread that it interrupts, without end."""
    with until_signalled() as stop:
        with stop._cond:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(10)


def test_without_a_signal_nothing_is_set_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with until_signalled() as stop:
        assert signal.getsignal(signal.SIGTERM) is not before
    assert not stop.is_set()
    assert signal.getsignal(signal.SIGTERM) is before
