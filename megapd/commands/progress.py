"""How a long task tells how far it is: a line now and then, which suits a log as well as a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

SECONDS = 10.0  # between lines


class Progress:
    """Lines on a stream: at most one each `seconds`, with the share done and the time that is left.

    progress = Progress("prepare", total=len(documents), unit="documents")
    for number, document in enumerate(documents, start=1):
        progress.update(number, f"{tokens:,} tokens")
    progress.close(f"{number:,} documents in {folder}")
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "",
        *,
        done: int = 0,
        seconds: float = SECONDS,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """what: begins each line. total: units in all, None: unknown. done: units that an earlier start has made. stream: None:
        stderr."""
        self._what, self._total, self._unit, self._seconds, self._clock = what, total, unit, seconds, clock
        self._stream = sys.stderr if stream is None else stream
        self._first = done
        self._began = self._told = clock()

    def update(self, done: int, more: str = "") -> None:
        """`done` units of the total are made; a line if it is time for one. more: what else it says."""
        now = self._clock()
        if now - self._told < self._seconds:
            return
        self._told = now
        of = "" if self._total is None else f" of {self._total:,}"
        left = time_left(done - self._first, now - self._began, None if self._total is None else self._total - done)
        self.say(", ".join(part for part in (f"{done:,}{of} {self._unit}".rstrip(), more, left) if part))

    def say(self, text: str) -> None:
        print(f"{self._what}: {text}", file=self._stream, flush=True)

    def close(self, text: str) -> None:
        """The last line, with the time that the whole took."""
        self.say(f"{text} ({duration(self._clock() - self._began)})")


def time_left(made: int, seconds: float, left: int | None) -> str:
    """`ETA 3 min 10 s`, from what was made in some seconds; "" where there is nothing to tell it by."""
    return f"ETA {duration(seconds / made * left)}" if made > 0 and left else ""


def duration(seconds: float) -> str:
    """As 0.8 s, 42 s, 3 min 10 s, 2 h 5 min, 3 d 4 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, part, lower in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part} {lower}"
    return f"{whole} s"


def scaled(number: float) -> str:
    """Three digits, as 412, 12.3k, 4.56M, 1.20G."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            value = number / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{suffix}"
    return f"{number:.3g}"
