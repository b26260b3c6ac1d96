"""What goes wrong between a student and its teachers costs no step, and where it must end, it says so early."""

import signal
import time
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest

from megapd.errors import SignalMismatch, TeacherLost
from megapd.processes.local import free_port
from megapd.teacher.server.flight import TeacherFlight
from megapd.teacher.wire.messages import SIGNAL
from tests.forked import Forked, environment
from tests.teacher.serving import (
    PLAN,
    TOKEN,
    FakeReplica,
    FakeTrajectory,
    batches_of,
    exchange,
    make_batch,
    queued,
    refused,
    run_through,
    same,
    served,
    stream_of,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("_soon")]


# ------------------------------------------------------------------------------------------------------------ failures


class Flipping(TeacherFlight):
    """Flips a bit of each second answer."""

    answered = 0

    def respond(self, request, answer):
        record = super().respond(request, answer)
        self.answered += 1
        if self.answered % 2 == 0:
            return record
        place = record.schema.get_field_index("values")
        column = record.column(place)
        leaf = column.values.values
        flipped = leaf.to_numpy().copy()
        flipped.view(np.uint8)[5] ^= 4
        rows = pa.FixedSizeListArray.from_arrays(pa.array(flipped), column.type.value_type.list_size)
        return record.set_column(place, record.schema.field(place), pa.LargeListArray.from_arrays(column.offsets, rows))


def test_flipped_bits_are_counted_and_asked_for_again(shared_memory):
    with served(flight_class=Flipping) as server, stream_of(server, shared_memory=shared_memory) as stream:
        assert len(list(run_through(stream, server.replica))) == 2 * PLAN.steps
        assert stream.counts["damaged"] >= PLAN.steps
        assert stream.counts["retries"] == stream.counts["damaged"]


def test_a_server_that_is_restarted(shared_memory):
    port, replica = free_port(), FakeReplica()
    with stream_of(f"grpc://127.0.0.1:{port}", shared_memory=shared_memory) as stream:
        for steps in (range(0, 4), range(4, 9)):
            retries = stream.counts["retries"]
            stream.request(steps.start, batches_of(steps.start))  # while nobody is there
            wait_for(lambda retries=retries: stream.counts["retries"] > retries)
            with served(replica, port=port):
                assert len(list(run_through(stream, replica, steps=steps))) == 2 * len(steps)
        assert stream.counts["retries"] > 0


def test_one_of_two_replicas_dies_and_no_step_is_lost():
    with served() as staying, served() as dying, stream_of(staying, dying) as stream:
        for step, _ in run_through(stream, staying.replica):
            if step == 3:
                dying.stop()
        assert dying.replica.asked
        assert len(staying.replica.asked) > len(dying.replica.asked)
        assert stream.counts["lost"] == 0


def test_a_teacher_that_hangs_is_left_for_another():
    hanging = FakeReplica()
    hanging.gate.clear()
    short = ("--teacher.call_seconds=0.5",)
    with served(hanging) as first, served() as second, stream_of(first, second, overrides=short) as stream:
        assert len(list(run_through(stream, second.replica))) == 2 * PLAN.steps
        assert stream.counts["retries"] > 0


def test_the_deadline_counts_from_when_the_signals_are_needed():
    address = f"grpc://127.0.0.1:{free_port()}"
    with stream_of(address, overrides=("--teacher.deadline_seconds=0.6",)) as stream:
        stream.request(0, batches_of(0))
        time.sleep(1.0)
        start = time.monotonic()
        with pytest.raises(TeacherLost, match=rf"step 0.*{address}.*refused.*deadline_seconds"):
            stream.signals(0, batches_of(0))
        assert 0.5 < time.monotonic() - start < 3
        assert stream.counts["lost"] == 1


def test_a_teacher_that_never_answers_is_lost_at_the_deadline():
    replica = FakeReplica()
    with served(replica) as server, stream_of(server, overrides=("--teacher.deadline_seconds=0.5",)) as stream:
        replica.gate.clear()
        stream.request(0, batches_of(0))
        with pytest.raises(TeacherLost, match=rf"step 0.*{server.address}"):
            stream.signals(0, batches_of(0))
        replica.gate.set()
        assert len(list(run_through(stream, replica, steps=range(1, 3)))) == 4


def test_another_run_of_equal_steps_is_refused_with_both_digests(shared_memory):
    own, other = FakeTrajectory("own"), FakeTrajectory("other")
    with served(FakeReplica(own)) as a, served(FakeReplica(own)) as b:
        with stream_of(a, b, trajectory=other, shared_memory=shared_memory) as stream:
            start = time.monotonic()
            with pytest.raises(SignalMismatch) as caught:
                stream.signals(0, batches_of(0))
            assert time.monotonic() - start < 10  # not the deadline's 20
            assert own.checkpoint(10).digest in str(caught.value)
            assert other.checkpoint(10).digest in str(caught.value)
            assert stream.counts["wrong_teacher"] >= 6
        away, short = f"grpc://127.0.0.1:{free_port()}", ("--teacher.deadline_seconds=1",)
        with (
            stream_of(a, away, trajectory=other, overrides=short) as stream,
            pytest.raises(TeacherLost, match="schedule names"),  # one is away, and may come back with the right files
        ):
            stream.signals(0, batches_of(0))


def test_a_replica_of_another_run_among_right_ones_costs_no_step():
    with served(FakeReplica(FakeTrajectory("other"))) as wrong, served() as right, stream_of(wrong, right) as stream:
        assert len(list(run_through(stream, right.replica))) == 2 * PLAN.steps
        assert stream.counts["wrong_teacher"] > 0


def test_a_refused_token_is_told_before_the_deadline(tmp_path, token_file):
    another = tmp_path / "another"
    another.write_bytes(TOKEN[::-1])
    with served(None, f"--teacher.token={token_file}") as server:
        for overrides in ((f"--teacher.token={another}",), ()):
            with stream_of(server, overrides=overrides) as stream:
                start = time.monotonic()
                with pytest.raises(TeacherLost, match=r"teacher\.token"):
                    stream.signals(0, batches_of(0))
                assert time.monotonic() - start < 10
                assert stream.counts["refused"] >= 3
        with stream_of(server, overrides=(f"--teacher.token={token_file}",)) as stream:
            assert len(list(run_through(stream, server.replica, steps=range(2)))) == 4


def test_a_request_that_no_teacher_can_answer_is_told_before_the_deadline():
    batch = make_batch(0)
    batch.ids[0, 0] = 5000
    with served() as server, stream_of(server) as stream, pytest.raises(TeacherLost, match="id 5000 is outside"):
        stream.signals(0, [batch])


def test_closing_ends_requests_under_way():
    replica = FakeReplica()
    with served(replica) as server, stream_of(server, overrides=("--teacher.call_seconds=60",)) as stream:
        replica.gate.clear()
        stream.request(0, batches_of(0))
        stream.request(1, batches_of(1))
        wait_for(lambda: replica.prepared)
        start = time.monotonic()
        stream.close()
        assert time.monotonic() - start < 5
        with pytest.raises((CancelledError, RuntimeError)):
            stream.signals(0, batches_of(0))


# --------------------------------------------------------------------------------------------------------------- drain


@pytest.fixture
def teacher_process(tmp_path):
    """(process, its address, what it printed since by lines)."""
    output = tmp_path / "output"
    output.touch()
    process = Forked("tests.teacher.replica_worker", ["--slow"], environment(), output)

    def printed():
        return output.read_text().splitlines()[1:]

    try:
        wait_for(lambda: "\n" in output.read_text(), 60)
        yield process, f"grpc://127.0.0.1:{int(output.read_text())}", printed
    finally:
        process.kill()


def test_sigterm_answers_what_is_queued_and_sends_the_rest_elsewhere(teacher_process):
    process, address, printed = teacher_process
    with served() as other, stream_of(address) as stream:
        batches = batches_of(0)
        stream.request(0, batches[:1])
        wait_for(lambda: printed() == ["asked"])
        stream.request(1, batches[1:])
        wait_for(lambda: queued(stream) == 1)
        process.send_signal(signal.SIGTERM)
        found = [*stream.signals(0, batches[:1]), *stream.signals(1, batches[1:])]
        for answer, batch in zip(found, batches, strict=True):
            assert same(answer, FakeReplica().expected(10, batch, stream.spec))
        assert process.wait(15) == 0
        assert printed() == ["asked", "asked", "drained"]
        assert stream.counts["retries"] == 0
        with stream_of(address, other) as second:
            assert len(list(run_through(second, other.replica, steps=range(3)))) == 6


def test_a_killed_server_that_comes_back(teacher_process):
    process, address, printed = teacher_process
    with stream_of(address, shared_memory=True) as stream:
        stream.signals(0, batches_of(0, 1))
        stream.request(1, batches_of(1))
        wait_for(lambda: printed() == ["asked"] * 2)
        process.kill()
        with served(port=int(address.rsplit(":", 1)[1])) as server:
            assert len(list(run_through(stream, server.replica, steps=range(1, 3)))) == 4
        assert stream.counts["retries"] > 0


def test_a_strangers_question_is_not_read(tmp_path, token_file):
    """gRPC would take 2 GiB of it: the token is looked at first."""
    output = tmp_path / "output"
    output.touch()
    process = Forked("tests.teacher.replica_worker", [f"--teacher.token={token_file}"], environment(), output)
    try:
        wait_for(lambda: output.read_text().endswith("\n"), 60)

        def peak():
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10

        before = peak()
        with flight.FlightClient(f"grpc://127.0.0.1:{int(output.read_text())}") as client:
            with pytest.raises(flight.FlightUnauthenticatedError):
                exchange(client, SIGNAL + bytes(128 << 20), b"Bearer " + TOKEN[::-1])
            assert peak() - before < 32 << 20
            with refused("invalid", "not an Arrow stream"):
                exchange(client, SIGNAL + bytes(128 << 20), b"Bearer " + TOKEN)
            assert peak() - before > 128 << 20
    finally:
        process.kill()
