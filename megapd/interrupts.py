"""SIGTERM and SIGINT as an event."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from queue import SimpleQueue

ENDING = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def until_signalled(stop: threading.Event | None = None) -> Iterator[threading.Event]:
    """An event, by default a new one, that SIGTERM and SIGINT set. Off the main thread, which alone gets them, nothing does.

    A thread sets it: the handler interrupts the main thread, which inside `stop.wait` may hold the lock that `stop.set` takes.
    """
    stop = threading.Event() if stop is None else stop
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signalled: SimpleQueue[bool] = SimpleQueue()  # whose `put` may interrupt another

    def tell() -> None:
        if signalled.get():
            stop.set()

    telling = threading.Thread(target=tell, name="signals", daemon=True)
    telling.start()
    before = {number: signal.signal(number, lambda *_: signalled.put(True)) for number in ENDING}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signalled.put(False)
        telling.join()
