"""What a run has to say to the scheduler, in order, kept until it is said."""

from __future__ import annotations

import json
import math
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from megapd.scheduler.client import answers
from megapd.scheduler.client.answers import DecisionAnswer
from megapd.scheduler.client.http import Contact, Refusal

REPORTS = 10_000  # that are kept while the service is away; the oldest go first, metrics.jsonl has them

# What a report holds of a line of metrics; held-out accuracy and loss under names of their own.
TOLD = ("loss", "divergence", "cross_entropy", "grad_norm", "lr", "tok_per_sec", "teacher_step")
NAMES = {
    "train": {**{name: name for name in TOLD}, "accuracy": "train_accuracy"},
    "eval": {"accuracy": "accuracy", "loss": "heldout_loss"},
}

T = TypeVar("T")


@dataclass(frozen=True)
class _Report:
    """answered: set when the service has answered, or will not."""

    step: int
    metrics: dict[str, float]
    answered: threading.Event = field(default_factory=threading.Event)


class Sender:
    """Reports of metrics, and where changes began, which the service is owed.

    step  student steps done, which a report that is told late is told with

    The run's thread calls `report`, both threads `owe`, the line's own thread the rest. A lock guards what is owed, and nothing
    else is called while it is held; reports need none: one thread puts them on one end, the other takes them off the other.
    """

    def __init__(
        self, contact: Contact, path: str, decided: Callable[[Sequence[DecisionAnswer]], None], wake: threading.Event
    ) -> None:
        """path: of the run. decided: hears what reports led to. wake: set when there is something to tell."""
        self.step = 0
        self._contact, self._path, self._decided, self._wake = contact, path, decided, wake
        self._outbox: deque[_Report] = deque(maxlen=REPORTS)
        self._owed: dict[str, int] = {}  # path of a change -> student step at which it began
        self._lock = threading.Lock()

    @property
    def untold(self) -> int:
        """Messages that were not told yet."""
        return len(self._outbox) + len(self._owed)

    def report(self, step: int, metrics: dict[str, float]) -> threading.Event:
        """After `step` student steps. Returns what is set when the service has answered, or will not."""
        report = _Report(step, metrics)
        self._outbox.append(report)
        self._wake.set()
        return report.answered

    def owe(self, change: str, step: int) -> None:
        """change: its path below the run's."""
        with self._lock:
            self._owed[f"{change}/applied"] = step
        self._wake.set()

    def forgive(self) -> None:
        """The service that was owed them has lost the run."""
        with self._lock:
            self._owed.clear()

    def release(self) -> None:
        """Whoever waits for an answer waits no more."""
        for report in list(self._outbox):
            report.answered.set()

    def tell(self, end: float) -> None:
        """Until there is no more to tell, or `end`, of time.monotonic. Where changes begin comes first: what a report leads to
        depends on it. Raises Away, and refusals that another token or another registration may make good."""
        while self._owed and time.monotonic() < end:
            with self._lock:
                path, step = next(iter(self._owed.items()))
            self._say(answers.ANYTHING, path, {"step": step})
            with self._lock:
                self._owed.pop(path)
        while self._outbox and time.monotonic() < end:
            report = self._outbox[0]
            body: dict[str, Any] = {"step": report.step, "metrics": report.metrics}
            if self.step > report.step:
                body["now"] = self.step
            answer = self._say(answers.REPORTED, "reports", body)
            if answer is not None and answer.decision is not None:
                self._decided([answer.decision])
            if self._outbox and self._outbox[0] is report:  # else it was pushed out by a later one
                self._outbox.popleft()
            report.answered.set()

    def _say(self, kind: TypeAdapter[T], path: str, body: Any) -> T | None:
        """None, and an error is logged, where the service refuses it for good."""
        answer = None
        try:
            answer = answers.ask(self._contact.api, kind, "POST", f"{self._path}/{path}", body)
        except Refusal as error:
            if error.status in (401, 403, 404):
                raise
            self._contact.complain(f"{path} of this run: {error}")
        self._contact.heard()
        return answer

    def tell_again(self, metrics: Path, step: int, *, heard: bool) -> None:
        """What the service has not heard of a run that goes on from `step`; heard: it can be asked what it has."""
        lines: dict[int, dict[str, float]] = {}
        for line in _recorded(metrics):
            if line["step"] <= step and line["kind"] in NAMES:
                lines.setdefault(line["step"], {}).update(figures(line["kind"], line))
        steps = sorted(lines)

        def lacks(at: int) -> bool:
            # Its own step of the run says nothing: that of a late report is the step at which it was sent, others may still lack.
            return not answers.ask(self._contact.api, answers.LIST, "GET", f"{self._path}/reports?after={at - 1}&limit=1")

        if heard and steps:  # most often it has them all
            steps = steps[bisect_left(steps, True, key=lacks) :] if lacks(steps[-1]) else []
        self._outbox.extend(_Report(at, lines[at]) for at in steps)


def figures(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """What a report holds of a line of metrics."""
    names = NAMES.get(kind, {})
    given = ((names[key], value) for key, value in values.items() if key in names)
    return {name: float(value) for name, value in given if isinstance(value, int | float) and math.isfinite(value)}


def _recorded(metrics: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl up to the first that a crash has damaged."""
    for text in metrics.read_text(errors="replace").split("\n") if metrics.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            return
        if not isinstance(line, dict) or not {"kind", "step"} <= line.keys():
            return
        yield line
