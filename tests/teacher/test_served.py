"""Served streams: both carriers give what the teacher answers, small requests go together, rotations are prepared."""

import logging
import os
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace

import pyarrow as pa
import pytest
import torch

from megapd.errors import TeacherLost, UserError
from megapd.signals import SignalSpec
from megapd.teacher.client import FixedEndpoints, RemoteTrajectory
from megapd.teacher.engine import Replica, Teacher, TeacherOptions
from megapd.teacher.server.dispatch import PATIENCE_SECONDS, Dispatcher, Job
from megapd.teacher.server.metrics import Metrics
from megapd.teacher.wire.refusals import Refused
from megapd.teacher.wire.requests import Memory, encode_request
from megapd.teacher.wire.shared_memory import Mappings, Slot, Slots, write
from megapd.trajectory import CheckpointTimeout
from megapd.world import join_world
from tests.teacher.serving import (
    PLAN,
    SPECS,
    STEPS,
    FakeReplica,
    FakeTrajectory,
    asked,
    batches_of,
    configuration,
    make_batch,
    queued,
    run_through,
    same,
    served,
    stream_of,
    wait_for,
)
from tests.teacher.teachers import write_trajectory

pytestmark = pytest.mark.usefixtures("_soon")


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("name", ["dense", "hidden"])
def test_what_is_asked_is_counted(name, shared_memory):
    with served() as server, stream_of(server, spec=SPECS[name], shared_memory=shared_memory) as stream:
        assert len(list(run_through(stream, server.replica))) == 2 * PLAN.steps
        heads = len(STEPS) if SPECS[name].kind == "hidden" else 0
        assert stream.counts["requests"] == 2 * PLAN.steps + heads
        assert len(stream._heads) <= 1  # old ones are dropped
        assert {key for key, value in stream.counts.items() if value} == {"requests"}


def test_the_real_teacher_over_the_wire_answers_as_in_the_process(tmp_path, shared_memory):
    trajectory, world = write_trajectory(tmp_path), join_world()
    options = TeacherOptions()
    replica, own = Replica(trajectory, world, options), Teacher(trajectory, world, options)
    replica.open(STEPS[0])
    batches = [make_batch(number, segments=False, length=21) for number in range(2)]
    for batch in batches:
        batch.ids.remainder_(2)
    ranges = SignalSpec("hidden"), SignalSpec("dense"), SignalSpec("topk", k=3), SignalSpec("sampled", k=4, seed=1)
    try:
        with served(replica) as server:
            for spec in (*ranges, SignalSpec("argmax")):
                with stream_of(server, spec=spec, trajectory=trajectory, shared_memory=shared_memory) as stream:
                    for step in (0, 4, 6):
                        own.rotate(PLAN.checkpoint_at(step))
                        stream.request(step, batches)
                        for found, batch in zip(stream.signals(step, batches), batches, strict=True):
                            expected = own.signal(batch, spec)
                            assert found.teacher == expected.teacher
                            # Micro-batches are answered together, so that sums may be taken in another order.
                            torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-6)
                            if spec.kind == "hidden":
                                assert torch.equal(found.head.weight, own.head().weight)
    finally:
        own.close()
        replica.close()


def test_requests_in_the_smallest_types_come_back_whole():
    for largest, expected in ((255, pa.uint8()), (256, pa.uint16()), (1 << 16, pa.uint32())):
        batch = make_batch(0, segments=True, padded=True)
        batch.ids[0, 0] = largest
        batch.ids.clamp_(max=largest)
        teacher = FakeTrajectory().checkpoint(10).digest
        record = encode_request(10, teacher, SPECS["topk"], batch)
        assert record.schema.field("ids").type.value_type == expected
        assert record.schema.field("segments").type.value_type == pa.uint8()
        request = asked(record)
        assert (request.step, request.teacher, request.spec) == (10, teacher, SPECS["topk"])
        assert record.schema.field("lengths").type == pa.uint8()
        for name in ("ids", "segments", "positions", "lengths"):
            assert torch.equal(getattr(request.batch, name), getattr(batch, name))
        assert not request.batch.labels.any()  # they never travel
    assert asked(record).id == asked(encode_request(10, teacher, SPECS["topk"], batch)).id
    with pytest.raises(ValueError, match="negative"):
        encode_request(10, teacher, SPECS["topk"], type(batch)(-batch.ids - 1, None, *[batch.positions] * 2, batch.sample_ids))


# ------------------------------------------------------------------------------------------------------ shared memory


def test_signals_stay_as_they_are_while_anything_refers_to_them():
    with served() as server, stream_of(server, shared_memory=True) as stream:
        kept = [found for _, found in run_through(stream, server.replica)]
        copies = [found.values.clone() for found in kept]
        for step in range(PLAN.steps):
            stream.signals(step, batches_of(step + 50))
        assert all(torch.equal(found.values, copy) for found, copy in zip(kept, copies, strict=True))
        assert len(stream._slots._free) <= 4  # reused: one a micro-batch, and what waited ahead
    assert torch.equal(kept[0].values, copies[0])  # after close, too


def test_an_answer_that_does_not_fit_grows_the_memory(monkeypatch):
    monkeypatch.setattr("megapd.teacher.wire.shared_memory.FIRST_BYTES", 1)
    monkeypatch.setattr("megapd.teacher.wire.shared_memory.GRANULE", 512)
    with served() as server, stream_of(server, shared_memory=True) as stream:
        assert len(list(run_through(stream, server.replica))) == 2 * PLAN.steps
        assert stream.counts["retries"] == 0
        assert server.replica.asked
        large = [make_batch(7, samples=60)]
        assert same(stream.signals(8, large)[0], server.replica.expected(30, large[0], stream.spec))


def test_memory_that_is_not_a_students_is_refused(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * (1 << 20))
    with secret.open("r+b") as file, served() as server, stream_of(server, shared_memory=True) as stream:
        monkeypatch.setattr(Slot, "memory", property(lambda slot: Memory(os.getpid(), file.fileno(), slot.name, 1 << 20)))
        with pytest.raises(TeacherLost, match=r"teacher\.carrier.*use served"):
            stream.signals(0, batches_of(0))
        assert secret.read_bytes() == b"x" * (1 << 20)
        assert stream.counts["refused"] >= 3
        # A process of another namespace, whose number is none here.
        monkeypatch.setattr(Slot, "memory", property(lambda slot: Memory(1 << 30, slot.fd, slot.name, 1 << 20)))
        with pytest.raises(TeacherLost, match=r"teacher\.carrier.*No such file"):
            stream.signals(1, batches_of(1))


def test_a_slot_that_a_lost_teacher_may_still_write_into_is_not_used_again():
    replica = FakeReplica()
    with served(replica) as server, stream_of(server, shared_memory=True, overrides=("--teacher.call_seconds=0.3",)) as stream:
        replica.gate.clear()
        stream.request(0, batches_of(0, 1))
        wait_for(lambda: stream.counts["retries"] >= 1)
        assert not stream._slots._free
        replica.gate.set()
        batches = batches_of(0, 1)
        assert same(stream.signals(0, batches)[0], replica.expected(10, batches[0], stream.spec))


@pytest.mark.slow
def test_memory_of_a_killed_student_is_let_go():
    command = [sys.executable, "-m", "tests.teacher.lending_worker"]
    mappings, record = Mappings(), pa.record_batch({"x": pa.array(range(10))})
    with subprocess.Popen(command, stdout=subprocess.PIPE) as student:
        memory = Memory(student.pid, int(student.stdout.readline()), "megapd-test", 1 << 20)
        assert write(record, mappings.open(memory)) > 80
        assert mappings.open(memory).address == mappings.open(memory).address  # kept
        with pytest.raises(Refused, match="use served"):
            Mappings().open(replace(memory, bytes=2 << 20))
        mappings.sweep()
        assert len(mappings) == 1
        student.kill()
    with pytest.raises(Refused, match="use served"):
        mappings.open(memory)
    mappings.sweep()
    assert len(mappings) == 0


def test_memory_that_could_shrink_is_refused():
    """A server that writes where a file has ended dies."""
    fd = os.memfd_create("megapd-loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 20)
    with pytest.raises(Refused, match=r"teacher\.carrier"):
        Mappings().open(Memory(os.getpid(), fd, "megapd-loose", 1 << 20))
    os.close(fd)


def test_mappings_are_few():
    slots, mappings = Slots(shared=True), Mappings(limit=2)
    held = [slots.take() for _ in range(4)]
    for slot in held:
        mappings.open(slot.memory)
    assert len(mappings) == 2


def test_slots_close_their_descriptors():
    before = len(os.listdir("/proc/self/fd"))
    slots = Slots(shared=True)
    held = [slots.take() for _ in range(5)]
    for _ in range(3):
        slots.give(held.pop())
    assert len(os.listdir("/proc/self/fd")) >= before + 5
    slots.close()
    while held:
        slots.give(held.pop())  # after the end: closed at once
    assert len(os.listdir("/proc/self/fd")) == before


# -------------------------------------------------------------------------------------------------------- many at once


def test_small_requests_are_answered_together_and_alone_where_one_is_at_fault():
    replica = FakeReplica()
    with served(replica, "--teacher.server.token_budget=120") as server, stream_of(server) as stream:
        replica.gate.clear()
        batches = batches_of(0, 6)  # 36 tokens each
        stream.request(8, batches[:1])
        wait_for(lambda: replica.entered == 1)
        stream.request(0, batches[1:])
        wait_for(lambda: queued(stream) == 5)
        replica.gate.set()
        found = stream.signals(0, batches[1:])
        assert all(same(one, replica.expected(10, batch, stream.spec)) for one, batch in zip(found, batches[1:], strict=True))
        assert replica.asked == [(30, 3), (10, 9), (10, 6)]

        replica.asked.clear()
        replica.gate.clear()
        blocked = replica.entered
        bad, good = batches_of(1, 2)
        replica.failing = 299
        bad.ids[0, 0], good.ids[good.ids == 299] = 299, 1
        stream.request(2, batches[:1])
        wait_for(lambda: replica.entered > blocked)
        stream.request(1, [batches[0], bad, good])
        wait_for(lambda: queued(stream) == 3)
        replica.gate.set()
        wait_for(lambda: stream.counts["retries"] >= 1)
        replica.failing = None
        assert len(stream.signals(1, [batches[0], bad, good])) == 3
        assert replica.asked[1:5] == [(10, 9), (10, 3), (10, 3), (10, 3)]  # together, then each alone


def test_one_question_of_several_students_is_answered_once():
    replica = FakeReplica()
    with served(replica) as server, stream_of(server) as first, stream_of(server) as second:
        replica.gate.clear()
        first.request(0, [make_batch(999)])
        wait_for(lambda: replica.entered == 1)
        batches = batches_of(1)
        first.request(1, batches)
        second.request(1, batches)
        wait_for(lambda: queued(first) == 4)
        replica.gate.set()
        for stream in (first, second):
            assert same(stream.signals(1, batches)[1], replica.expected(10, batches[1], stream.spec))
        assert replica.asked[-1] == (10, 6)


def test_requests_for_the_present_checkpoint_go_first_but_nobody_waits_long():
    replica = FakeReplica()
    dispatcher = Dispatcher(replica, Metrics(), limit=9, token_budget=36)  # one request at a time

    def submit(step):
        teacher, batch = replica.trajectory.checkpoint(step).digest, make_batch(len(replica.prepared))
        request = asked(encode_request(step, teacher, SPECS["dense"], batch))
        job = Job(step, teacher, request, lambda: False)
        dispatcher.submit(job)
        return job

    def turn():
        dispatcher.turn(0)
        return replica.asked[-1][0]

    submit(10)
    assert turn() == 10
    waiting = submit(30)
    for _ in range(3):
        submit(10)
    assert turn() == 10  # it is in memory
    waiting.arrived -= 2 * PATIENCE_SECONDS
    assert turn() == 10  # the present checkpoint has not had its time yet
    dispatcher._rotated -= 2 * PATIENCE_SECONDS
    assert turn() == 30
    assert turn() == 10
    assert dispatcher.queued == 0


def test_a_checkpoint_that_is_being_staged_does_not_hold_others_up():
    replica, staged = FakeReplica(), Future()
    replica.staging[30] = staged
    with served(replica) as server, stream_of(server) as stream, stream_of(server) as other:
        late = batches_of(6)
        other.request(6, late)
        wait_for(lambda: queued(stream) == 2)
        assert len(list(run_through(stream, replica, steps=range(0, 4)))) == 8
        staged.set_result(None)
        assert same(other.signals(6, late)[0], replica.expected(30, late[0], other.spec))


def test_a_full_queue_is_waited_for():
    replica = FakeReplica()
    with served(replica, "--teacher.server.queue=1") as server, stream_of(server) as stream:
        replica.gate.clear()
        batches = batches_of(0, 8)
        stream.request(0, batches)
        wait_for(lambda: stream.counts["retries"] >= 5)
        replica.gate.set()
        found = stream.signals(0, batches)
        assert all(same(one, replica.expected(10, batch, stream.spec)) for one, batch in zip(found, batches, strict=True))


# ----------------------------------------------------------------------------------------------------------- rotations


def test_the_next_checkpoint_is_prepared_on_every_replica_before_it_teaches():
    with served() as a, served() as b, stream_of(a, b) as stream:
        stream.request(0, batches_of(0))
        wait_for(lambda: 20 in a.replica.prepared and 20 in b.replica.prepared)
        assert 30 not in a.replica.prepared
        stream.signals(0, batches_of(0))
        stream.signals(4, batches_of(4))
        wait_for(lambda: 30 in a.replica.prepared and 30 in b.replica.prepared)


def test_a_checkpoint_that_cannot_be_prepared_is_an_error_long_before_its_step(caplog):
    replica, failed = FakeReplica(), Future()
    failed.set_exception(UserError("step_20/model.safetensors: its sha256 is another"))
    replica.staging[20] = failed
    with served(replica) as server, stream_of(server) as stream, caplog.at_level(logging.ERROR):
        stream.request(0, batches_of(0))
        wait_for(lambda: any(record.name.endswith("announce") for record in caplog.records))
        line = next(record.getMessage() for record in caplog.records if record.name.endswith("announce"))
        assert "its sha256 is another" in line
        assert "teacher step 20" in line
        assert "student step 4" in line
        assert server.address in line


# ------------------------------------------------------------------------------------------------------ RemoteTrajectory


def test_a_student_without_the_folder_resolves_its_schedule(monkeypatch):
    trajectory = FakeTrajectory()
    with served(FakeReplica(trajectory)) as server:
        remote = RemoteTrajectory(configuration().teacher, FixedEndpoints([server.address]))
        assert remote.steps == STEPS
        assert remote.incomplete == ()
        found, own = remote.checkpoint(20), trajectory.checkpoint(20)
        for name in ("step", "digest", "vocabulary", "config", "metrics"):
            assert getattr(found, name) == getattr(own, name)
        assert found.files == {}
        with pytest.raises(UserError, match="nearest are 10, 20, 30"):
            remote.checkpoint(25)
        with pytest.raises(CheckpointTimeout, match="step 40"):
            remote.wait_for(40, 0.2)
        trajectory.steps = (*STEPS, 40)
        assert remote.written(40)
        assert remote.wait_for(40, 0.2).step == 40
        assert remote.refresh() == (*STEPS, 40)
        with stream_of(server, trajectory=remote) as stream:
            assert len(list(run_through(stream, server.replica))) == 2 * PLAN.steps
    monkeypatch.setattr("megapd.teacher.client.trajectory.ANSWER_SECONDS", 0.5)
    assert remote.checkpoint(20).digest == found.digest  # known
    with pytest.raises(UserError, match=r"teacher\.endpoints"):
        RemoteTrajectory(configuration().teacher, FixedEndpoints([server.address]))
