"""Stopping a run from outside: SIGTERM, SIGUSR1 or the file `stop` in the run's folder."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Notices a request; the loop sums it over all ranks at each step boundary, so that they stop together.

    The handlers only set a flag: the launcher signals ranks one after the other, up to 30 s apart, and one that acted alone
    would leave the others in a collective.
    """

    def __init__(self, stop_file: Path, watches_file: bool) -> None:
        self.reason: str | None = None
        self._file = stop_file
        self._watches = watches_file
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def pending(self) -> bool:
        if self.reason is None and self._watches and self._file.exists():
            self.reason = f"the file {self._file}"
        return self.reason is not None

    def close(self) -> None:
        """Give the signals back; a stop file that was honoured is removed, so that the next start does not stop at once."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._watches and self.reason is not None:
            self._file.unlink(missing_ok=True)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
