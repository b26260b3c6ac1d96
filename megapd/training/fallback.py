"""The signals of a step, or what the run does without them: the same on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Literal, NamedTuple

from megapd.batch import Batch
from megapd.errors import TeacherLost
from megapd.signals import Signal
from megapd.training.run import Run

log = logging.getLogger(__name__)


class Taken(NamedTuple):
    """One signal a micro-batch, or None: learn from the labels. source: where they come from."""

    signals: Iterable[Signal | None]
    source: Literal["teacher", "cache", "labels"]


def take_signals(run: Run, step: int, batches: Sequence[Batch]) -> Taken:
    """The signals of `step`; where one rank has none, all ranks follow teacher.on_failure together.

    A decision of one rank alone would leave the others waiting for it in a collective of the student's. Fallbacks are counted in
    the run's state, hence in metrics and checkpoints. Raises what the stream raised, on all ranks if on one.
    """
    if run.stream is None:
        return Taken(repeat(None), "labels")
    assert run.config.teacher is not None
    failure: Exception | None = None
    signals: Iterable[Signal] = ()
    try:
        signals = run.stream.signals(step, batches)
    except Exception as error:  # raised below, when the other ranks know
        failure = error
    if run.config.teacher.carrier == "colocated":
        if failure is not None:
            raise failure
        return Taken(signals, "teacher")  # ranks that share a teacher fail together, see Teacher.rotate
    lost = isinstance(failure, TeacherLost)
    ranks_lost, ranks_wrong = run.world.sum(int(lost), int(failure is not None and not lost))
    if ranks_wrong:
        messages = _messages(run, failure if not lost else None)
        raise failure if failure is not None and not lost else RuntimeError(f"step {step}: another rank failed: {messages}")
    if not ranks_lost:
        return Taken(signals, "teacher")
    policy = run.config.teacher.on_failure
    if policy == "cache":
        found = _from_cache(run, step, batches)
        if found is not None:
            _count(run, step, "steps_from_cache", "recorded signals", ranks_lost)
            return Taken(found, "cache")
    elif policy == "labels":
        _count(run, step, "steps_from_labels", "the labels", ranks_lost)
        return Taken(repeat(None), "labels")
    messages = _messages(run, failure)
    if policy == "cache":
        messages += f"; and teacher.cache {run.config.teacher.cache} lacks signals of this step"
    raise TeacherLost(messages) from failure


def _messages(run: Run, failure: Exception | None) -> str:
    """What went wrong, on whichever ranks: rank 0 alone speaks, and may be well itself. A collective."""
    found = [message for message in run.world.gather(None if failure is None else str(failure)) if message is not None]
    return "; ".join(dict.fromkeys(found))


def _from_cache(run: Run, step: int, batches: Sequence[Batch]) -> list[Signal] | None:
    """The recorded signals of the step, if every rank has all of its own."""
    assert run.stream is not None
    assert run.fallback is not None
    teacher = run.stream.teacher(step)
    found = [run.fallback.lookup(teacher.digest, run.stream.spec, batch) for batch in batches]
    whole = [signal.to(run.world.device) for signal in found if signal is not None]
    missing = run.world.sum(len(found) - len(whole))[0]
    return None if missing else whole


def _count(run: Run, step: int, key: str, source: str, ranks: int) -> None:
    run.state[key] += 1
    if run.writes:
        log.warning(
            "step %d: no signal on %d ranks, all ranks learn from %s (%d steps so far)", step, ranks, source, run.state[key]
        )
