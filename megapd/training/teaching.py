"""What teaches a run: its plan, the stream of signals, changes of the schedule, the record of who taught, the fallback."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import repeat
from typing import Any, Literal, NamedTuple

from megapd.batch import Batch
from megapd.config import Config, TeacherConfig
from megapd.errors import SignalNotFinite, TeacherLost
from megapd.schedule.plan import Change, Plan
from megapd.schedule.record import FILE, ScheduleRecord
from megapd.signals import Signal, not_finite
from megapd.tasks import Task
from megapd.teacher.cache.cache import SignalCache
from megapd.teacher.setup import open_stream
from megapd.teacher.stream import Stream
from megapd.training.changes import Changes, open_changes
from megapd.training.folder import RunFolder
from megapd.trajectory import Checkpoint, Checkpoints, CheckpointTimeout
from megapd.world import World

log = logging.getLogger(__name__)

Source = Literal["teacher", "cache", "labels"]
Curriculum = tuple[Checkpoints, Plan]  # a teacher's trajectory, and what the run's own schedule resolved to over it


class Taken(NamedTuple):
    """One signal a micro-batch, or None: learn from the labels. source: where they come from."""

    signals: Iterable[Signal | None]
    source: Source


class NoTeacher:
    """Learning from labels alone: what Teaching offers, where nothing teaches or no step is left to be taught.

    ahead: steps before its own that a step's signals are asked for.
    state: what a checkpoint of the run carries of it, equal on all ranks.
    """

    ahead = 0

    def __init__(self, changes: Changes) -> None:
        """changes: its source, on rank 0, is what metrics are reported to, also of a run that nothing teaches."""
        self._journal, self._changes = changes, changes.source
        self.state: dict[str, int] = {"steps_from_cache": 0, "steps_from_labels": 0, "decisions": 0}

    def next_change(self, step: int) -> Change | None:
        """Before each student step: the change of the schedule that all ranks are to `take`, as far as this one knows; only rank
        0 knows of any."""
        return None if self._changes is None else self._changes.next(step)

    def take(self, change: Change | None) -> None:
        """What rank 0 has heard of, taken in by all ranks at the same step, long before the step at which it begins."""
        raise AssertionError(f"{change} changes a schedule that there is not")

    def came(self, step: int, stop: Callable[[], bool]) -> bool:
        """Wait until every rank can see the checkpoint that teaches `step`; False if any was asked to stop meanwhile."""
        return True

    def rotation(self, step: int) -> Checkpoint | None:
        """The checkpoint that begins to teach at `step`, on record from here on; None: the one before goes on."""
        return None

    def request(self, step: int, batches: Sequence[Batch]) -> None:
        """Ask for the signals of a step to come, see Stream.request."""

    def signals(self, step: int, batches: Sequence[Batch]) -> Taken:
        """The signals of `step`, or what the run does without them, the same on all ranks."""
        return Taken(repeat(None), "labels")

    def accuse(self, step: int, batches: Sequence[Batch]) -> None:
        """After a step whose loss was not finite: raises SignalNotFinite, on all ranks, where the teacher's signals are not."""

    def metrics(self, step: int, divergence: float) -> dict[str, Any]:
        """What a line of metrics says of the teacher of `step`; divergence: from it, the mean of the step."""
        return {}

    def report(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """A line of metrics, kind train or eval, after `step` student steps. What the scheduler, or an adaptive schedule, makes
        of it reaches all ranks with their next step."""
        if self._changes is not None:
            self._changes.report(kind, step, values)

    def sync(self) -> dict[str, Any]:
        """Before a checkpoint of the run is written, on rank 0: what was reported lasts as the checkpoint does, which carries
        what this returns."""
        return self._journal.sync()

    def close(self) -> None:
        if self._changes is not None:
            self._changes.close()


class Teaching(NoTeacher):
    """A teacher that its schedule takes through its checkpoints. plan: which teaches when; stream: their signals."""

    def __init__(self, settings: TeacherConfig, changes: Changes, stream: Stream, record: ScheduleRecord, world: World) -> None:
        super().__init__(changes)
        assert changes.plan is not None
        self.plan, self.stream, self.ahead = changes.plan, stream, settings.depth
        self._settings, self._record, self._world = settings, record, world
        folder = settings.cache if settings.on_failure == "cache" else None
        self._recorded = None if folder is None else SignalCache(folder)

    def take(self, change: Change | None) -> None:
        self.plan.take(self._world.gather(change)[0])
        self.state["decisions"] = self.plan.known

    def came(self, step: int, stop: Callable[[], bool]) -> bool:
        """Only `follow` waits: its teacher may still be training. All ranks poll together, so that they stop or give up together.

        Raises CheckpointTimeout, on all ranks, when the schedule's time is over.
        """
        seconds = self.plan.version_at(step).timeout
        if seconds is None:
            return True
        deadline = time.monotonic() + seconds
        while True:
            late = int(time.monotonic() > deadline)
            ready, stops, late = self._world.sum(int(self.stream.ready(step)), int(stop()), late)
            if stops:
                return False
            if ready == self._world.size:
                return True
            if late:
                what = f"no checkpoint of the teacher's step {self.plan.checkpoint_at(step)} after {seconds:g} s"
                raise CheckpointTimeout(f"schedule.timeout_seconds: {what}; is the teacher running, and does it write this step?")
            time.sleep(0.1)

    def rotation(self, step: int) -> Checkpoint | None:
        """Raises UserError for another checkpoint than the one that taught, or is registered, as the teacher's step."""
        if step > 0 and self.plan.checkpoint_at(step) == self.plan.checkpoint_at(step - 1):
            return None
        checkpoint = self.stream.teacher(step)
        self._record.confirm(checkpoint)
        return checkpoint

    def request(self, step: int, batches: Sequence[Batch]) -> None:
        for batch in batches:
            _ = batch.digest  # cached in the batch: signals are checked against it, and hashing is kept off the loop's thread
        self.stream.request(step, batches)

    def signals(self, step: int, batches: Sequence[Batch]) -> Taken:
        """Where one rank has no signals, all ranks follow teacher.on_failure together.

        A decision of one rank alone would leave the others waiting for it in a collective of the student's. Fallbacks are counted
        in `state`, hence in metrics and checkpoints. Raises what the stream raised, on all ranks if on one.
        """
        if self._settings.carrier == "colocated":  # ranks that share a teacher fail together, see Teacher.rotate
            return Taken(self.stream.signals(step, batches), "teacher")
        failure: Exception | None = None
        signals: Iterable[Signal] = ()
        try:
            signals = self.stream.signals(step, batches)
        except Exception as error:  # raised below, when the other ranks know
            failure = error
        wrong = failure if not isinstance(failure, TeacherLost) else None
        ranks_lost, ranks_wrong = self._world.sum(int(isinstance(failure, TeacherLost)), int(wrong is not None))
        if ranks_wrong:
            messages = self._messages(wrong)
            raise wrong or RuntimeError(f"step {step}: another rank failed: {messages}")
        return self._without(step, batches, ranks_lost, failure) if ranks_lost else Taken(signals, "teacher")

    def accuse(self, step: int, batches: Sequence[Batch]) -> None:
        """The signals are asked for once more, so that a step whose loss is finite pays nothing for it."""
        wrong = [not signal.finite() for signal in self.signals(step, batches).signals if signal is not None]
        if self._world.sum(sum(wrong))[0]:
            raise SignalNotFinite(f"step {step}: {not_finite(self.plan.checkpoint_at(step))}")

    def metrics(self, step: int, divergence: float) -> dict[str, Any]:
        counts = () if self._settings.on_failure == "wait" else ("steps_from_cache", "steps_from_labels")
        told = {"divergence": divergence, "teacher_step": self.plan.checkpoint_at(step)}
        return {key: self.state[key] for key in counts} | told

    def close(self) -> None:
        super().close()
        self.stream.close()
        if self._recorded is not None:
            self._recorded.close()

    def _without(self, step: int, batches: Sequence[Batch], ranks: int, failure: Exception | None) -> Taken:
        """What all ranks learn from at a step whose signals did not come on `ranks` of them. Raises TeacherLost."""
        found = None if self._recorded is None else self._from_cache(self._recorded, step, batches)
        if found is not None:
            self._count(step, "steps_from_cache", "recorded signals", ranks)
            return Taken(found, "cache")
        if self._settings.on_failure == "labels":
            self._count(step, "steps_from_labels", "the labels", ranks)
            return Taken(repeat(None), "labels")
        messages = self._messages(failure)
        if self._recorded is not None:
            messages += f"; and teacher.cache {self._settings.cache} lacks signals of this step"
        raise TeacherLost(messages) from failure

    def _from_cache(self, recorded: SignalCache, step: int, batches: Sequence[Batch]) -> list[Signal] | None:
        """The recorded signals of the step, if every rank has all of its own."""
        teacher = self.stream.teacher(step)
        found = [recorded.lookup(teacher.digest, self.stream.spec, batch) for batch in batches]
        whole = [signal.to(self._world.device) for signal in found if signal is not None]
        missing = self._world.sum(len(found) - len(whole))[0]
        return None if missing else whole

    def _messages(self, failure: Exception | None) -> str:
        """What went wrong, on whichever ranks: rank 0 alone speaks, and may be well itself. A collective."""
        found = [text for text in self._world.gather(None if failure is None else str(failure)) if text is not None]
        return "; ".join(dict.fromkeys(found))

    def _count(self, step: int, key: str, source: str, ranks: int) -> None:
        self.state[key] += 1
        if self._world.rank == 0:
            steps = self.state[key]
            log.warning("step %d: no signal on %d ranks, all ranks learn from %s (%d steps so far)", step, ranks, source, steps)


def open_teaching(
    config: Config, task: Task, world: World, curriculum: Curriculum | None, state: Mapping[str, Any], folder: RunFolder
) -> NoTeacher:
    """What teaches the run from its next step on, its first teacher in place. A collective.

    curriculum: None: no teacher. state: of the checkpoint that the run resumes from, {}: none. Raises UserError where the record
    and the schedule differ.
    """
    step = state.get("step", 0)
    trajectory, plan = curriculum or (None, None)
    with ExitStack() as opened:
        known, rests = state.get("decisions", 0), state.get("journal", {})
        changes = open_changes(config, plan, trajectory, world, run=folder.run, step=step, known=known, rests=rests)
        if changes.source is not None:
            opened.callback(changes.source.close)
        teaching = NoTeacher(changes)
        if config.teacher is not None and changes.plan is not None and trajectory is not None:
            path, resumed, writes = config.folder / FILE, folder.resumed, world.rank == 0
            record = ScheduleRecord(
                path, changes.plan, run=folder.run, resumed=resumed, writes=writes, registered=changes.registered
            )
            if step < config.training.steps:
                stream = open_stream(config, task, trajectory, changes.plan, world, step)
                opened.callback(stream.close)
                record.confirm(first := stream.teacher(step))
                if world.rank == 0 and first.config.get("seed") == config.seed:
                    shared = f"{config.seed} is also that of the teacher, {first.path}"
                    log.warning("seed: %s: this run sees the same samples, in the same order; give it another", shared)
                teaching = Teaching(config.teacher, changes, stream, record, world)
        teaching.state |= {key: value for key, value in state.items() if key in teaching.state}
        opened.pop_all()
    return teaching
