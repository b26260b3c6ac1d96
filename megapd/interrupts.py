"""SIGTERM and SIGINT as an event."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

ENDING = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def until_signalled(stop: threading.Event | None = None) -> Iterator[threading.Event]:
    """An event, by default a new one, that SIGTERM and SIGINT set. Off the main thread, which alone gets them, nothing does."""
    stop = threading.Event() if stop is None else stop
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in ENDING}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
