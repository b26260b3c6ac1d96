"""A run's stream whose signals a test sees on their way to the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megapd.batch import Batch
from megapd.signals import Signal
from megapd.teacher.stream import Stream
from megapd.training import Run, Teaching


class WatchedStream:
    """seen: called with each (step, batch, signal) before the student has the signal."""

    def __init__(self, source: Stream, seen: Callable[[int, Batch, Signal], None]) -> None:
        self._source, self._seen = source, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def signals(self, step: int, batches: Sequence[Batch]) -> Iterator[Signal]:
        answers = iter(self._source.signals(step, batches))  # what it raises, the call raises

        def each() -> Iterator[Signal]:
            for batch, signal in zip(batches, answers, strict=True):
                self._seen(step, batch, signal)
                yield signal

        return each()


def watch(run: Run, seen: Callable[[int, Batch, Signal], None]) -> Teaching:
    """From here on; what teaches the run."""
    assert isinstance(run.teaching, Teaching)
    run.teaching.stream = WatchedStream(run.teaching.stream, seen)
    return run.teaching
