"""A run under way, what may be hooked to it, and how it is stopped from outside."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from megapd.config import Config
from megapd.tasks import Task
from megapd.training.engine import Engine
from megapd.training.folder import RunFolder
from megapd.training.state import CheckpointStore
from megapd.training.teaching import NoTeacher, Source, Teaching
from megapd.trajectory import Checkpoint
from megapd.world import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Notices SIGTERM, SIGUSR1, the file `stop` in the run's folder, or `request`; outside a process' main thread, where Python
    hands no signal, only the latter two.

    The loop sums it over all ranks at each step boundary, so that they stop together. The handlers only set a flag: the launcher
    signals ranks one after the other, up to 30 s apart, and one that acted alone would leave the others in a collective.
    """

    def __init__(self, stop_file: Path, watches_file: bool) -> None:
        self.reason: str | None = None
        self._file, self._watches = stop_file, watches_file

    def request(self, reason: str) -> None:
        """Stop all ranks before their next step, this one's checkpoint saved; by one rank or several."""
        self.reason = reason

    def pending(self) -> bool:
        if self.reason is None and self._watches and self._file.exists():
            self.reason = f"the file {self._file}"
        return self.reason is not None

    def __enter__(self) -> None:
        numbers = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._before = {
            number: signal.signal(number, lambda received, _: self.request(signal.Signals(received).name)) for number in numbers
        }

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Give the signals back; a stop file that was honoured is removed, so that the next start does not stop at once."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._watches and self.reason is not None:
            self._file.unlink(missing_ok=True)


@dataclass
class StepResult:
    """What came of one student step.

    step      student steps done, this one included
    labelled  labelled positions of the global batch
    lr        learning rate
    source    where the signals came from
    applied   False: the gradients were not finite, and the update was skipped
    metrics   global means and counts of the step, the same on all ranks, at steps for which a callback is `due`; what a callback
              adds is in the line of metrics.jsonl, if the step has one
    top_agreement  share of the teacher's likeliest classes that are among the student's, where evaluations are due and signals
              tell it
    """

    step: int
    labelled: int
    lr: float
    source: Source
    applied: bool
    metrics: dict[str, Any] | None
    top_agreement: float | None = None


class Callback:
    """What a run does beside learning: a base class whose every method may be left out.

    Each is called on all ranks, at the same steps, in the order of Run.callbacks, so that it may communicate. What it raises ends
    the run. It looks at the run, and may change what it learns, which then is the callback's to repeat on resume.

    name: the key of its state in checkpoints, different for each callback of a run; by default that of its class.
    """

    name: str

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = cls.__dict__.get("name", cls.__name__)

    def start(self, run: Run) -> None:
        """The run is ready, or resumed at run.step, and `load_state_dict` was called. Of a complete run, too."""

    def before_step(self, run: Run, step: int) -> None:
        """All ranks have agreed to make the step after `step` others, and its teacher is there."""

    def due(self, step: int) -> bool:
        """Whether `after_step` wants the metrics of the step that makes `step` in all, which cost a synchronisation of the device
        and of the ranks. Equal on all ranks."""
        return False

    def after_step(self, run: Run, result: StepResult) -> None:
        """The update is made, or skipped."""

    def rotated(self, run: Run, step: int, checkpoint: Checkpoint) -> None:
        """`checkpoint` teaches from the step after `step` others on."""

    def evaluated(self, run: Run, step: int, values: dict[str, float]) -> None:
        """The held-out loss, accuracy and number of samples after `step` steps."""

    def saved(self, run: Run, step: int, folder: Path) -> None:
        """A checkpoint that the run can be resumed from is on the disk."""

    def end(self, run: Run, *, finished: bool) -> None:
        """After the last step, or where a request stopped the run; not after an error. The last checkpoint follows."""

    def close(self) -> None:
        """In any case, and last: after an error, too, when other ranks may be gone."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint carries for `load_state_dict`, equal on all ranks: numbers, text, None, tensors, and lists and
        dictionaries of them. A run is not resumed without a callback whose state its checkpoint carries."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of the checkpoint that the run resumes from, before `start`."""


@dataclass
class Progress:
    """How far the run is: counts of student steps, of those whose update was not finite, and of overflows in fp16."""

    step: int = 0
    nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    overflows: int = 0


@dataclass
class Waited:
    """Seconds of this start in which the loop's thread waited: for a batch, or for the teacher (its checkpoint, its signals)."""

    data: float = 0.0
    teacher: float = 0.0

    @contextmanager
    def counted(self, what: Literal["data", "teacher"]) -> Iterator[None]:
        began = time.perf_counter()
        yield
        setattr(self, what, getattr(self, what) + time.perf_counter() - began)


@dataclass
class Run:
    """Everything the loop needs.

    folder     its place on the disk, locked by it
    callbacks  in the order in which they are called
    start      student steps done before: 0, or where the run resumes
    saved      student steps of the newest checkpoint, -1: none
    latest     last metrics of each kind that this start of the run made: train/loss, eval/accuracy
    waited     how long the loop waited for data and for the teacher
    opened     what `close` closes
    """

    config: Config
    world: World
    task: Task
    engine: Engine
    teaching: Teaching | NoTeacher
    folder: RunFolder
    store: CheckpointStore
    stop: StopRequest
    callbacks: list[Callback]
    progress: Progress
    start: int
    saved: int
    opened: ExitStack
    latest: dict[str, float] = field(default_factory=dict)
    waited: Waited = field(default_factory=Waited)

    @property
    def step(self) -> int:
        """Student steps done."""
        return self.progress.step

    @property
    def steps(self) -> int:
        """Student steps of the whole run."""
        return self.config.training.steps

    @property
    def writes(self) -> bool:
        """Whether this rank is the one that writes to the run's folder."""
        return self.world.rank == 0

    def close(self) -> None:
        self.opened.close()


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens each `every` steps, and at the last, happens after `step` steps."""
    return step == last or (every > 0 and step % every == 0)
