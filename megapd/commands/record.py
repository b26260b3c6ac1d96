"""Record a schedule's signals: what `megapd record CONFIG` does, so that students can be taught without the teacher."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from tqdm import tqdm

from megapd.batch import Batch
from megapd.config import Config
from megapd.errors import UserError
from megapd.models import checkpoint_shape
from megapd.schedule.plan import Plan
from megapd.schedule.resolve import resolve_plan
from megapd.tasks import Task, build_task
from megapd.teacher.cache import CachedStream, SignalCache
from megapd.teacher.limits import check_teachers
from megapd.teacher.locate import open_trajectory
from megapd.teacher.setup import open_source, rank_agreement
from megapd.teacher.stream import Stream
from megapd.tiling import tile
from megapd.trajectory import Checkpoints
from megapd.world import World, join_world

TELL_SECONDS = 10.0  # between lines, where there is no bar


@dataclass(frozen=True)
class RecordSummary:
    """What one rank did.

    samples    of its share of the schedule; found: of these, in the cache before; recorded: written now
    positions  labelled positions of the samples recorded
    bytes      of the files written, heads included
    seconds    of the whole walk
    """

    samples: int
    found: int
    recorded: int
    positions: int
    bytes: int
    seconds: float

    @staticmethod
    def together(parts: Sequence[RecordSummary]) -> RecordSummary:
        """What several ranks did side by side."""
        counts = ("samples", "found", "recorded", "positions", "bytes")
        sums = {name: sum(getattr(part, name) for part in parts) for name in counts}
        return RecordSummary(**sums, seconds=max(part.seconds for part in parts))

    def __str__(self) -> str:
        return (
            f"{self.samples:,} samples: {self.recorded:,} recorded, {self.found:,} there before; {self.bytes:,} bytes, "
            f"{self.bytes_per_position:,.1f} a labelled position; {self.seconds:.1f} s, "
            f"{self.samples / max(self.seconds, 1e-9):,.1f} signals/s"
        )

    @property
    def bytes_per_position(self) -> float:
        """Bytes on disk a labelled position recorded; 0 if none was."""
        return self.bytes / self.positions if self.positions else 0.0


def record(
    config: Config,
    task: Task,
    plan: Plan,
    trajectory: Checkpoints,
    stream: Stream,
    cache: SignalCache,
    world: World,
    *,
    classes: int,
    agree: Callable[[list[bool]], list[bool]] | None = None,
) -> RecordSummary:
    """Ask `stream` for every signal of the schedule that the cache, just opened, lacks, and write it there; closes both.

    What is there is read and verified, and recorded again if it is damaged, so that a walk that was killed, or is repeated, asks
    for the rest alone. classes: of the teacher's head; agree: see CachedStream.
    Raises UserError if the ranks do not divide the batch, or the cache cannot be written.
    """
    # As training tiles them: every rank has as many, since a sharded teacher answers all ranks at once, and what training reads
    # together lies together.
    rows = tile(config.training, world.size).rows(world.rank)
    began = time.perf_counter()
    cached = CachedStream(cache, plan, stream.spec, trajectory, stream, classes=classes, agree=agree)
    depth = config.teacher.depth if config.teacher is not None else 1
    ahead: deque[list[Batch]] = deque()
    upcoming = samples = 0
    shown = world.rank == 0 and config.telemetry.progress
    quiet, told = None if shown else True, began  # None: a bar where stderr is a terminal
    bar = tqdm(total=plan.steps, desc="record", unit=" steps", disable=quiet, file=sys.stderr, dynamic_ncols=True)
    try:
        for step in range(plan.steps):
            while upcoming < min(step + depth + 1, plan.steps):
                ahead.append([task.batch(upcoming, part) for part in rows])
                cached.request(upcoming, ahead[-1])
                upcoming += 1
            batches = [batch.to(world.device) for batch in ahead.popleft()]
            for _ in cached.signals(step, batches):
                _check(cache)
            samples += sum(batch.samples for batch in batches)
            bar.update()
            now = time.perf_counter()
            if shown and bar.disable and now - told >= TELL_SECONDS:
                told = now
                print(progress(step + 1, plan.steps, samples * world.size, now - began), flush=True)
        cache.flush()
        _check(cache)
    finally:
        bar.close()
        cached.close()
    found, recorded, seconds = cache.counts["hits"], cache.counts["recorded"], time.perf_counter() - began
    return RecordSummary(samples, found, recorded, cache.positions, cache.written_bytes, seconds)


def progress(done: int, steps: int, samples: int, seconds: float) -> str:
    """A line for whoever has no terminal: `done` of `steps` steps, their samples' signals, in `seconds`."""
    left = timedelta(seconds=round(seconds * (steps - done) / done))
    return f"record: step {done:,} of {steps:,}, {samples:,} signals, {samples / seconds:,.1f} signals/s, {left} left"


def _check(cache: SignalCache) -> None:
    if cache.failure is not None:
        raise UserError(cache.failure)


def record_signals(config: Config) -> int:
    """Fill teacher.cache with the signals of the whole schedule; each rank records its share, rank 0 prints what all did."""
    teacher = config.teacher
    if teacher is None or teacher.cache is None:
        raise UserError("teacher.cache: name the folder that signals are to be recorded in")
    folder = teacher.cache
    if teacher.carrier == "cached":
        carrier = "served" if teacher.endpoints else "colocated"
        if carrier == "colocated" and teacher.trajectory is None:
            raise UserError("teacher.trajectory: recording needs a teacher; name its trajectory, or teacher.endpoints")
        teacher = teacher.model_copy(update={"carrier": carrier})
        config = config.model_copy(update={"teacher": teacher})
    world = join_world()
    task, trajectory = build_task(config), open_trajectory(config)
    plan = resolve_plan(config, trajectory)
    if config.schedule is not None and config.schedule.grows:
        why = "decides while a student trains, so its signals cannot be recorded ahead of it"
        raise UserError(f"schedule.policy: {config.schedule.policy} {why}")
    check_teachers(config, task, trajectory, plan)
    stream = open_source(config, task, trajectory, plan, world, 0)
    classes, agree = checkpoint_shape(stream.teacher(0)).classes, rank_agreement(teacher, world)
    mine = record(config, task, plan, trajectory, stream, SignalCache(folder), world, classes=classes, agree=agree)
    parts = world.gather(mine)
    if world.rank == 0:
        print(RecordSummary.together(parts), flush=True)
    return 0
