"""Leases: replicas hold them at a scheduler in a process of its own, and students find the replicas by them."""

from __future__ import annotations

import contextlib
import gc
import itertools
import signal
import subprocess
import sys
import threading
import time

import pyarrow.flight as flight
import pytest
import torch

from megapd.cli import main
from megapd.config import SchedulerConfig, TeacherServerConfig, load
from megapd.errors import UserError
from megapd.scheduler.client.lease import LeasedEndpoints, ReplicaLease, advertised
from megapd.teacher.client import ServedStream
from megapd.teacher.locate import open_endpoints, open_trajectory
from tests.forked import environment
from tests.scheduler.services import Process
from tests.teacher.launching import START_SECONDS, Server, free_ports
from tests.teacher.serving import (
    PLAN,
    SPECS,
    STEPS,
    FakeReplica,
    FakeTrajectory,
    Served,
    act,
    configuration,
    run_through,
    served,
    wait_for,
)
from tests.teacher.teachers import MODELS, TASK, write_trajectory

pytestmark = pytest.mark.slow

LEASE_SECONDS = 1.0
A, B = "grpc://127.0.0.1:1", "grpc://127.0.0.1:2"

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr("megapd.scheduler.client.lease.POLL_SECONDS", 0.05)
    monkeypatch.setattr("megapd.scheduler.client.lease.RETRY_SECONDS", 0.1)
    monkeypatch.setattr("megapd.teacher.client.replicas.BACKOFF", (0.02, 1.0))
    monkeypatch.setattr("megapd.teacher.server.dispatch.POLL_SECONDS", 0.02)
    monkeypatch.setattr("megapd.teacher.client.announce.AGAIN_SECONDS", 0.05)


class Service:
    """A scheduler's process, and what a test says to it without a lease's help. name: of a run and a group that only it has."""

    def __init__(self, process) -> None:
        self.process, self.name = process, f"test-{next(_numbers)}"
        self.http = process.http()  # one for all: to make a client takes a tenth of a second of the beats' time
        self.began = max([event["id"] for event in self.ask("GET", "/v1/events?limit=1000")], default=-1)
        self.settings = SchedulerConfig(url=self.process.url)
        self.override = f"--scheduler.url={self.process.url}"

    def ask(self, method, path, body=None):
        response = self.http.request(method, path, json=body)
        response.raise_for_status()
        return response.json() if response.content else None

    def put_run(self, group):
        self.ask("PUT", f"/v1/runs/{self.name}", {"steps": 9, "group": group})

    def leases(self):
        return {lease["endpoint"]: lease for lease in self.ask("GET", "/v1/replicas")}

    def history(self, endpoint):
        """What became of a replica: (state, reason), in order."""
        found = self.ask("GET", f"/v1/events?limit=1000&after={self.began}")
        events = [event["body"] for event in found if event["kind"] == "replica"]
        return [(body["state"], body.get("reason", "")) for body in events if body["endpoint"] == endpoint]


@contextlib.contextmanager
def running(folder):
    process = Process(f"sqlite:///{folder}/scheduler.db", LEASE_SECONDS)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.kill()


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    with running(tmp_path_factory.mktemp("scheduler")) as process:
        yield process


@pytest.fixture
def service(process):
    """Without tokens; with leases of this test alone."""
    service = Service(process)
    assert not service.leases()
    with contextlib.closing(service.http):
        yield service
        for lease in service.leases().values():
            service.ask("DELETE", f"/v1/replicas/{lease['id']}")


@pytest.fixture
def guarded(tmp_path):
    """One of its own, for a test that makes tokens."""
    with running(tmp_path) as process:
        service = Service(process)
        with contextlib.closing(service.http):
            yield service


@contextlib.contextmanager
def endpoints_of(service, **settings):
    endpoints = LeasedEndpoints(service.settings.model_copy(update=settings), service.name)
    try:
        yield endpoints
    finally:
        endpoints.close()


def lease_of(service, endpoint, group=None, **settings):
    given = service.settings.model_copy(update=settings)
    return ReplicaLease(given, group or service.name, endpoint, {"at": "home"}, lambda: {"queued": 3.0})


def told(caplog, text):
    return sum(text in record.getMessage() for record in caplog.records if record.name.startswith("megapd.scheduler.client."))


def polling():
    return [thread for thread in threading.enumerate() if thread.name == "teacher-endpoints"]


# --------------------------------------------------------------------------------------------------------------- the list


def test_a_runs_list_follows_what_becomes_of_its_replicas(service):
    service.put_run("group")
    with endpoints_of(service) as endpoints, lease_of(service, A, "group") as first, lease_of(service, B, "group"):
        wait_for(lambda: set(endpoints.current()) == {A, B})
        assert list(endpoints.current()) == service.ask("GET", f"/v1/runs/{service.name}/assignment")["endpoints"]
        first.drain()
        assert service.leases()[A]["state"] == "draining"
        wait_for(lambda: endpoints.current() == (B,))
        time.sleep(2 * LEASE_SECONDS)
        assert service.leases()[A]["state"] == "draining", "it beats on while it drains"
        # One that falls silent: registered, and never heard of again.
        silent = "grpc://127.0.0.1:3"
        service.ask("PUT", "/v1/replicas/silent", {"group": "group", "endpoint": silent})
        wait_for(lambda: set(endpoints.current()) == {B, silent})
        wait_for(lambda: endpoints.current() == (B,))
        assert service.history(silent) == [("live", ""), ("gone", "expired")]
    assert service.history(A) == [("live", ""), ("draining", ""), ("gone", "left")]
    assert service.history(B) == [("live", ""), ("gone", "left")]


def test_a_run_that_is_not_registered_has_the_replicas_of_its_group(service):
    with (
        endpoints_of(service) as own,
        endpoints_of(service, group="others") as others,
        lease_of(service, A) as first,
        lease_of(service, B, "others"),
    ):
        wait_for(lambda: own.current() == (A,) and others.current() == (B,))
        first.drain()
        wait_for(lambda: own.current() == ())
        service.put_run("others")
        wait_for(lambda: own.current() == (B,))


def test_an_address_that_is_none_does_not_keep_students_from_the_others(service, caplog):
    service.ask("PUT", "/v1/replicas/odd", {"group": service.name, "endpoint": "grpc://host:99999"})
    with lease_of(service, A), endpoints_of(service) as endpoints:
        wait_for(lambda: endpoints.current() == (A,))
        time.sleep(0.2)
    assert told(caplog, "99999") == 1


def test_the_list_and_the_leases_outlive_the_service(service, caplog):
    with lease_of(service, A) as lease, endpoints_of(service) as endpoints:
        wait_for(lambda: endpoints.current() == (A,))
        service.process.kill()
        time.sleep(2 * LEASE_SECONDS)
        assert endpoints.current() == (A,)
        assert told(caplog, "does not answer") == 2, "once each"
        assert told(caplog, "answers again") == 0
        lease_b = lease_of(service, B)
        with lease_b:  # it begins while there is no service
            service.process.start()
            wait_for(lambda: endpoints.current() == (A, B))
            wait_for(lambda: told(caplog, "answers again") == 3)
            time.sleep(2 * LEASE_SECONDS)
            assert {lease["id"] for lease in service.leases().values()} == {lease.id, lease_b.id}
        wait_for(lambda: endpoints.current() == (A,))
    assert service.history(A) == [("live", ""), ("gone", "left")], "one lease, which it kept"


def test_a_service_that_is_away_is_waited_for_once(service, monkeypatch):
    service.process.kill()
    monkeypatch.setattr("megapd.scheduler.client.lease.FIRST_SECONDS", 0.3)
    with endpoints_of(service) as endpoints:
        began = time.monotonic()
        assert endpoints.current() == ()
        assert 0.3 <= time.monotonic() - began < 4.0
        assert endpoints.current() == ()
        service.process.start()
        with lease_of(service, B):
            wait_for(lambda: endpoints.current() == (B,))
        wait_for(lambda: endpoints.current() == ())


def test_what_answers_like_no_scheduler_is_away(service, caplog):
    answers = {f"/v1/runs/{service.name}/assignment": [1, 2]}
    with endpoints_of(service) as endpoints, lease_of(service, B) as lease:
        wait_for(lambda: endpoints.current() == (B,))
        for contact in (endpoints._watch._contact, lease._contact):
            contact.api.ask = lambda method, path, body=None: answers.get(path)
        wait_for(lambda: told(caplog, "as no scheduler does") == 2)
        assert endpoints.current() == (B,)
        assert lease._thread.is_alive()


# --------------------------------------------------------------------------------------------------------------- a replica


def test_a_lease_that_was_dropped_is_taken_again(service, caplog):
    with lease_of(service, A) as lease:
        wait_for(lambda: service.leases()[A]["figures"] == {"queued": 3.0})
        service.ask("DELETE", f"/v1/replicas/{lease.id}")
        wait_for(lambda: A in service.leases())
        assert service.leases()[A]["id"] == lease.id
    assert told(caplog, "had dropped the lease") == 1
    assert service.history(A) == [("live", ""), ("gone", "left")] * 2
    with lease_of(service, B) as lease:  # one that drains is not
        lease.drain()
        service.ask("DELETE", f"/v1/replicas/{lease.id}")
        time.sleep(2 * LEASE_SECONDS)
        assert B not in service.leases()


def test_a_replica_ends_soon_though_the_service_hangs(service, monkeypatch, caplog):
    monkeypatch.setattr("megapd.scheduler.client.lease.SAY_SECONDS", 0.3)
    lease = lease_of(service, A)
    try:
        with lease:
            service.process.process.send_signal(signal.SIGSTOP)  # connections are taken, and nothing is answered
            began = time.monotonic()
            lease.drain()
        assert time.monotonic() - began < 3.0
        assert told(caplog, "was not told that") == 2
    finally:
        service.process.process.send_signal(signal.SIGCONT)
    wait_for(lambda: not lease._thread.is_alive())


def test_a_token_that_is_refused_ends_students_and_replicas(guarded, tmp_path, capsys):
    service = guarded
    path = tmp_path / "token"
    wrong = {"token": path}
    path.write_text(service.ask("POST", "/v1/tokens", {"name": "reader", "role": "read"})["token"])
    with endpoints_of(service, **wrong) as endpoints:
        assert endpoints.current() == (), "a student needs the role read"
    with (
        pytest.raises(UserError, match=r"scheduler\.token: .*role run.*megapd scheduler token run"),
        lease_of(service, A, **wrong),
    ):
        pass
    with pytest.raises(UserError, match=r"scheduler\.token: .*role run"):
        Served(FakeReplica(), configuration(service.override, f"--scheduler.token={path}"))
    path.write_text("not-a-token")
    with endpoints_of(service, **wrong) as endpoints:
        for _ in range(2):
            with pytest.raises(UserError, match=r"scheduler\.token: .*megapd scheduler token read"):
                endpoints.current()
    write_trajectory(tmp_path / "trajectory", steps=STEPS[:1])
    arguments = [*TASK, *MODELS["gpt"], f"--teacher.trajectory={tmp_path / 'trajectory'}", "--schedule.policy=one_shot"]
    teacher = ["teacher", *arguments, "--teacher.server.port=0", service.override, f"--scheduler.token={path}"]
    assert main(teacher) == 2
    assert "scheduler.token" in capsys.readouterr().err


def test_a_token_that_is_revoked_later_ends_nobody(guarded, caplog):
    service = guarded
    with lease_of(service, A) as lease, endpoints_of(service) as endpoints:
        wait_for(lambda: endpoints.current() == (A,))
        service.ask("POST", "/v1/tokens", {"name": "admin", "role": "admin"})  # from now on all need one
        wait_for(lambda: told(caplog, "a bearer token is needed") == 2)
        assert endpoints.current() == (A,)
        assert lease._thread.is_alive()
    assert told(caplog, "will run out") == 1


def test_the_address_that_students_are_told():
    tls = {"certificate": "c", "key": "k"}
    for settings, expected in (
        ({}, "grpc://127.0.0.1:5"),
        ({"host": "0.0.0.0", "advertise": "node-3.cluster"}, "grpc://node-3.cluster:5"),
        ({"host": "::1"} | tls, "grpc+tls://[::1]:5"),
    ):
        assert advertised(TeacherServerConfig(**settings), 5) == expected
    for host in ("0.0.0.0", "::"):
        with pytest.raises(UserError, match=r"teacher\.server\.advertise: .*this machine"):
            advertised(TeacherServerConfig(host=host), 5)
    with pytest.raises(UserError, match=r"teacher\.server\.advertise: 'host:1' is no host"):
        advertised(TeacherServerConfig(advertise="host:1"), 5)
    with pytest.raises(UserError, match=r"teacher\.server\.advertise"):
        load(None, ["--teacher.trajectory=x", "--schedule.policy=one_shot", "--teacher.server.advertise=grpc://host"])


def test_an_address_that_is_missing_is_told_before_the_model_is_built(capsys):
    settings = ["--teacher.trajectory=none-there", "--schedule.policy=one_shot", "--teacher.server.host=0.0.0.0"]
    for replicas in (1, 2):
        arguments = [*settings, f"--teacher.server.replicas={replicas}", "--scheduler.url=http://127.0.0.1:1"]
        assert main(["teacher", *arguments]) == 2
        assert "teacher.server.advertise" in capsys.readouterr().err
    remote = ["--schedule.policy=one_shot", "--teacher.carrier=served", "--scheduler.url=http://127.0.0.1:1"]
    assert main(["teacher", *remote]) == 2
    assert "teacher.trajectory" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- servers and students


def test_a_server_that_ends_sends_students_elsewhere_first(service, monkeypatch):
    health, drain = [], ReplicaLease.drain

    def noted(lease):
        with contextlib.closing(flight.FlightClient(lease.endpoint)) as client:
            health.append(act(client, "health"))
            drain(lease)
            health.append(act(client, "health"))

    monkeypatch.setattr(ReplicaLease, "drain", noted)
    with served(None, service.override, "--scheduler.group=group") as server:
        lease = service.leases()[server.address]
        assert (lease["group"], lease["state"]) == ("group", "live")
        wait_for(lambda: service.leases()[server.address]["figures"] == {"tokens_per_second": 0.0, "queued": 0.0})
    assert health == [{"draining": False}, {"draining": False}]
    assert service.history(server.address) == [("live", ""), ("draining", ""), ("gone", "left")]


@contextlib.contextmanager
def student(service):
    """A stream whose replicas the scheduler names."""
    config = configuration("--teacher.carrier=served", service.override, f"--name={service.name}")
    endpoints = open_endpoints(config)
    device = torch.device("cpu")
    stream = ServedStream(
        config.teacher, PLAN, SPECS["hidden"], FakeTrajectory(), device=device, shared_memory=False, endpoints=endpoints
    )
    try:
        yield stream
    finally:
        stream.close()


def test_a_student_goes_on_with_the_second_replica_when_the_first_is_killed(service):
    service.put_run(service.name)
    named = [service.override, f"--name={service.name}"]
    arguments = [sys.executable, "-m", "tests.teacher.replica_worker", *named]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment())
    try:
        first = f"grpc://127.0.0.1:{int(process.stdout.readline())}"
        with student(service) as stream:
            assert [remote.address for remote in stream._replicas.current()] == [first]
            list(run_through(stream, FakeReplica(), range(3)))
            assert stream.counts["retries"] == 0
            with served(None, *named) as second:
                wait_for(lambda: len(stream._replicas.current()) == 2)
                order = service.ask("GET", f"/v1/runs/{service.name}/assignment")["endpoints"]
                assert [remote.address for remote in stream._replicas.current()] == order, "the run's own order"
                wait_for(lambda: 20 in second.replica.prepared)  # though it came late
                steps = run_through(stream, FakeReplica(), range(3, PLAN.steps))
                next(steps)
                process.kill()
                assert len(list(steps)) == 2 * (PLAN.steps - 3) - 1
                assert second.replica.asked
                wait_for(lambda: [remote.address for remote in stream._replicas.current()] == [second.address])
                assert stream.counts["lost"] == 0
            wait_for(lambda: not stream._replicas.current())
            assert "scheduler.url" in stream._replicas.describe()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert service.history(first) == [("live", ""), ("gone", "expired")]
    wait_for(lambda: not polling())


def test_a_trajectory_that_the_leased_replicas_serve(service):
    settings = ["--schedule.policy=one_shot", "--teacher.carrier=shared_memory", service.override]
    with served(None, service.override):
        trajectory = open_trajectory(load(None, settings))
        assert trajectory.steps == STEPS
        assert polling()
        trajectory.close()
        wait_for(lambda: not polling())
        trajectory = open_trajectory(load(None, settings))
        assert trajectory.checkpoint(20).digest == FakeTrajectory().checkpoint(20).digest
        del trajectory  # whoever does not close it
        gc.collect()
        wait_for(lambda: not polling())


@pytest.mark.parametrize("replicas", [1, pytest.param(2, marks=pytest.mark.full)])
def test_the_replicas_of_one_command_hold_leases_and_give_them_back(service, tmp_path, replicas):
    write_trajectory(tmp_path / "trajectory", steps=STEPS[:1])
    settings = [*TASK, *MODELS["gpt"], f"--teacher.trajectory={tmp_path / 'trajectory'}", "--schedule.policy=one_shot"]
    settings += [f"--teacher.server.replicas={replicas}", "--teacher.server.advertise=localhost", service.override, "--name=pair"]
    server = Server(settings, free_ports(replicas))
    addresses = [f"grpc://localhost:{server.port + number}" for number in range(replicas)]
    try:
        wait_for(lambda: len(service.leases()) == replicas or server.process.poll() is not None, START_SECONDS)
        leases = service.leases()
        assert sorted(leases) == addresses, server.printed()
        assert {lease["group"] for lease in leases.values()} == {"pair"}
        with contextlib.closing(flight.FlightClient(addresses[-1])) as client:
            assert act(client, "trajectory")["steps"] == [STEPS[0]]
        assert server.stop() == 0, server.printed()
        for address in addresses:
            assert service.history(address) == [("live", ""), ("draining", ""), ("gone", "left")]
    finally:
        server.stop()
