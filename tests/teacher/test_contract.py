"""Contract 4: streams are interchangeable. What a student's loop relies on, over every carrier."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from megapd.errors import SignalMismatch, TeacherLost, UserError
from megapd.teacher.cache import CachedStream, SignalCache
from megapd.teacher.stream import ColocatedStream, Stream
from tests.teacher.serving import (
    CLASSES,
    DIGESTS,
    PLAN,
    SPECS,
    STEPS,
    FakeReplica,
    FakeTrajectory,
    batches_of,
    make_batch,
    run_through,
    same,
    served,
    stream_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("_soon")]

CARRIERS = ("colocated", "served", "shared_memory", "recording", "cached")
REMOTE = ("served", "shared_memory")
EVERY = [batch for step in range(PLAN.steps) for batch in batches_of(step, segments=step % 2 == 0)]


class InProcess:
    """The teacher of a co-located stream: a replica without a server."""

    def __init__(self, replica):
        self.replica, self.held, self.closed = replica, None, False

    def ready(self, step):
        return self.replica.trajectory.written(step)

    def rotate(self, step):
        if self.held is None or self.held.step != step:
            self.held = self.replica.trajectory.checkpoint(step)
        return self.held

    def prepare(self, step):
        self.replica.prepare(step)

    def signal(self, batch, spec):
        return _with_head(self.replica, self.held.step, self.replica.signal(self.held.step, batch, spec))

    def close(self):
        self.closed = True


@contextlib.contextmanager
def carried(carrier, spec, folder, replica=None, trajectory=None, overrides=()):
    """A stream by this carrier from `replica`; trajectory: the student's own, by default the replica's. cached: what the replica
    said about EVERY batch, each for the teacher of its step, is there."""
    replica = replica or FakeReplica()
    own = trajectory or replica.trajectory
    if carrier in REMOTE:
        asked = {"spec": spec, "trajectory": own, "shared_memory": carrier == "shared_memory", "overrides": overrides}
        with served(replica) as server, stream_of(server, **asked) as stream:
            yield stream
        return
    if carrier == "cached":
        _record(folder, replica, spec)
    cache = SignalCache(folder)
    if carrier == "cached":
        stream: Stream = CachedStream(cache, PLAN, spec, own)
    else:
        stream = ColocatedStream(InProcess(replica), PLAN, spec)
        if carrier == "recording":
            stream = CachedStream(cache, PLAN, spec, own, stream, classes=CLASSES)
    try:
        yield stream
    finally:
        stream.close()


def _record(folder, replica, spec):
    cache = SignalCache(folder)
    for step in STEPS:
        if replica.trajectory.written(step):
            for batch in (*EVERY, _without_labels()):
                cache.record(_with_head(replica, step, replica.expected(step, batch, spec)), batch, CLASSES)
    cache.close()


def _with_head(replica, step, signal):
    """A server sends it apart."""
    return signal if signal.head is None else replace(signal, head=replica.head(step))


def _without_labels():
    batch = make_batch(0)
    return type(batch)(batch.ids, None, batch.positions[:0], batch.labels[:0], batch.sample_ids)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_every_step_has_what_the_plans_teacher_answers(carrier, name, tmp_path):
    """Asked for ahead; bitwise, with both digests, and the head where there is one."""
    replica, spec = FakeReplica(), SPECS[name]
    kept = []
    with carried(carrier, spec, tmp_path, replica) as stream:
        assert stream.spec == spec
        for step, found in run_through(stream, replica):
            named = PLAN.checkpoint_at(step)
            assert stream.ready(step)
            assert stream.teacher(step).step == named
            assert stream.teacher(step).digest == found.teacher == DIGESTS[named]
            assert (found.head is not None) == (spec.kind == "hidden")
            if found.head is not None:
                assert torch.equal(found.head.weight, replica.head(named).weight)
                assert torch.equal(found.head.bias, replica.head(named).bias)
            kept.append((found, found.values.clone()))
        assert len(kept) == 2 * PLAN.steps
    assert all(torch.equal(found.values, copy) for found, copy in kept)  # what was handed out stays, after the end too


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_step_that_was_not_requested_or_for_other_batches(carrier, tmp_path):
    replica = FakeReplica()
    with carried(carrier, SPECS["dense"], tmp_path, replica) as stream:
        assert len(list(run_through(stream, replica, steps=range(4), ahead=-1))) == 8
        stream.request(5, batches_of(2))
        batches = batches_of(5)
        assert same(next(iter(stream.signals(5, batches))), replica.expected(20, batches[0], stream.spec))
        assert list(stream.signals(6, [])) == []
        (nothing,) = stream.signals(7, [_without_labels()])
        assert nothing.values.shape[0] == 0


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_checkpoint_that_is_still_to_be_written(carrier, tmp_path):
    """`ready` says so; what was requested meanwhile comes once it is there."""
    trajectory = FakeTrajectory(steps=STEPS[:1])
    replica = FakeReplica(trajectory)
    with carried(carrier, SPECS["dense"], tmp_path, replica) as stream:
        assert stream.ready(0)
        assert not stream.ready(4)
        stream.request(4, batches_of(4))
        trajectory.steps = STEPS
        assert stream.ready(4)
        if carrier == "cached":  # nobody answers
            with pytest.raises(UserError, match="lacks 6 of the 6 samples of step 4"):
                stream.signals(4, batches_of(4))
            return
        for found, batch in zip(stream.signals(4, batches_of(4)), batches_of(4), strict=True):
            assert same(found, replica.expected(20, batch, stream.spec))
        if carrier in REMOTE:
            assert stream.counts["retries"] == 0


class Confused(FakeReplica):
    """Answers by another checkpoint than it is asked for."""

    def signal(self, step, batch, spec):
        return super().signal(30, batch, spec)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_another_teacher_than_the_schedule_names_is_refused(carrier, tmp_path):
    """With both digests; a cache has no answers of that teacher at all."""
    trajectory = FakeTrajectory("another")
    wanted = trajectory.checkpoint(10).digest
    # Where student and teacher share the trajectory, an answer of another checkpoint stands for it.
    near = carrier in ("colocated", "recording")
    replica = Confused(trajectory) if near else FakeReplica()
    with carried(carrier, SPECS["dense"], tmp_path, replica, trajectory) as stream:
        if carrier == "cached":
            with pytest.raises(UserError, match="lacks 6 of the 6"):
                stream.signals(0, batches_of(0))
            return
        with pytest.raises(SignalMismatch) as caught:
            list(stream.signals(0, batches_of(0)))
        assert wanted in str(caught.value)
        assert (trajectory.checkpoint(30).digest if near else DIGESTS[10]) in str(caught.value)


@pytest.mark.parametrize("carrier", REMOTE)
def test_a_lost_teacher_is_told_by_the_call_and_the_next_step_may_come(carrier, tmp_path):
    replica = FakeReplica()
    with carried(carrier, SPECS["dense"], tmp_path, replica, overrides=("--teacher.deadline_seconds=0.3",)) as stream:
        replica.gate.clear()
        stream.request(0, batches_of(0))
        with pytest.raises(TeacherLost, match="step 0"):
            stream.signals(0, batches_of(0))
        replica.gate.set()
        assert len(list(run_through(stream, replica, steps=range(1, 3)))) == 4


@pytest.mark.parametrize("carrier", CARRIERS)
def test_closing_ends_it_whatever_is_under_way(carrier, tmp_path):
    replica = FakeReplica()
    with carried(carrier, SPECS["dense"], tmp_path, replica) as stream:
        stream.request(0, batches_of(0))
        stream.close()
        stream.close()  # twice does no harm
