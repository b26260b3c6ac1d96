"""Leases: who is dropped and who is not, across restarts, pauses and replacements; and what students' lists say."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future

import pytest

from megapd.scheduler.service.lease_table import LeaseTable
from megapd.scheduler.store import events as journal
from megapd.scheduler.store import runs
from megapd.scheduler.store.database import Conflict, NotFound, Store


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path):
    with contextlib.closing(Store(f"sqlite:///{tmp_path}/s.db")) as found:
        yield found


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def leases(store, clock):
    return LeaseTable(store, 10.0, clock)


def run(store: Store, name: str, group: str = "g") -> None:
    store.write(lambda c: runs.put_run(c, name, trajectory=None, group=group, steps=100, facts={}))


def assignment(store: Store, name: str) -> dict:
    return store.read(lambda c: runs.assignment(c, name))


def pass_time(leases: LeaseTable, clock: Clock, seconds: float, beating: tuple[str, ...] = ()) -> None:
    """Time goes by, swept as the service does it."""
    end = clock.now + seconds
    while clock.now < end:
        clock.now += leases.interval
        for id in beating:
            leases.heartbeat(id, {})
        for write in leases.sweep():
            write.result(10)


def test_lists_follow_the_replicas(store, leases):
    run(store, "r")
    run(store, "other", group="h")
    assert assignment(store, "r") == {"version": 0, "endpoints": []}
    assert leases.register("a", "g", "grpc://a:1", {}).result(10)
    assert leases.register("b", "g", "grpc://b:1", {}).result(10)
    assert assignment(store, "r")["version"] == 2
    assert set(assignment(store, "r")["endpoints"]) == {"grpc://a:1", "grpc://b:1"}
    leases.drain("a").result(10)
    assert assignment(store, "r") == {"version": 3, "endpoints": ["grpc://b:1"]}
    assert leases.heartbeat("a", {}).state == "draining"
    leases.leave("a").result(10)
    assert assignment(store, "r")["version"] == 3  # the list did not change
    leases.leave("b").result(10)
    assert assignment(store, "r") == {"version": 4, "endpoints": []}
    assert assignment(store, "other")["version"] == 0


def test_a_run_that_comes_later_has_the_list(store, leases):
    leases.register("a", "g", "grpc://a:1", {}).result(10)
    run(store, "r")
    assert assignment(store, "r")["endpoints"] == ["grpc://a:1"]
    run(store, "r", group="empty")
    assert assignment(store, "r")["endpoints"] == []


def test_runs_begin_with_different_replicas(store, leases):
    for number in range(4):
        leases.register(f"p{number}", "g", f"grpc://h{number}:1", {}).result(10)
    for number in range(20):
        run(store, f"r{number}")
    firsts = {assignment(store, f"r{number}")["endpoints"][0] for number in range(20)}
    assert len(firsts) >= 3


def test_the_silent_are_dropped_and_told_so(store, leases, clock):
    run(store, "r")
    for id in ("a", "b"):
        leases.register(id, "g", f"grpc://{id}:1", {}).result(10)
    pass_time(leases, clock, 9.0, beating=("a",))
    assert len(leases.held()) == 2
    pass_time(leases, clock, 3.0, beating=("a",))
    assert [lease.id for lease in leases.held()] == ["a"]
    assert assignment(store, "r")["endpoints"] == ["grpc://a:1"]
    with pytest.raises(NotFound):
        leases.heartbeat("b", {})
    events = store.read(lambda c: journal.events_after(c, 0, 100))
    assert [e["body"]["reason"] for e in events if e["kind"] == "replica" and e["body"]["state"] == "gone"] == ["expired"]
    assert not leases.register("b", "g", "grpc://b:1", {}).result(10)  # known, and back
    assert set(assignment(store, "r")["endpoints"]) == {"grpc://a:1", "grpc://b:1"}


def test_a_restart_gives_a_whole_lease(store, leases, clock):
    for id in ("a", "b"):
        leases.register(id, "g", f"grpc://{id}:1", {}).result(10)
    leases.drain("b").result(10)
    clock.now += 500.0  # the service was away, and with it what it had heard
    again = LeaseTable(store, 10.0, clock)
    assert {lease.id: lease.state for lease in again.held()} == {"a": "live", "b": "draining"}
    pass_time(again, clock, 9.0)
    assert len(again.held()) == 2
    pass_time(again, clock, 2.5)
    assert len(again.held()) == 0


def test_a_service_that_stood_still_drops_nobody_for_it(leases, clock):
    leases.register("a", "g", "grpc://a:1", {}).result(10)
    pass_time(leases, clock, 5.0)
    clock.now += 60.0
    assert leases.sweep() == []
    pass_time(leases, clock, 3.0)
    assert len(leases.held()) == 1
    pass_time(leases, clock, 5.0)
    assert len(leases.held()) == 0


def test_a_heartbeat_that_comes_before_the_drop_is_written_keeps_the_lease(store, leases, clock):
    import threading

    leases.register("a", "g", "grpc://a:1", {}).result(10)
    for _ in range(10):
        clock.now += leases.interval
        leases.sweep()
    begun, release = threading.Event(), threading.Event()

    def hold(connection):
        begun.set()
        release.wait(10)

    store.submit(hold)
    begun.wait(10)
    clock.now += leases.interval
    (drop,) = leases.sweep()
    leases.heartbeat("a", {})
    release.set()
    drop.result(10)
    assert len(leases.held()) == 1


def test_registering_again_is_the_same_lease(store, leases):
    assert leases.register("a", "g", "grpc://a:1", {}).result(10)
    newest = store.read(journal.span)
    assert not leases.register("a", "g", "grpc://a:1", {}).result(10)
    assert store.read(journal.span) == newest
    with pytest.raises(Conflict):
        leases.register("a", "g", "grpc://b:1", {}).result(10)


def test_a_replica_started_again_replaces_the_one_before(store, leases):
    run(store, "r")
    leases.register("a", "g", "grpc://a:1", {}).result(10)
    leases.register("a2", "g", "grpc://a:1", {}).result(10)
    assert [lease.id for lease in leases.held()] == ["a2"]
    assert assignment(store, "r")["endpoints"] == ["grpc://a:1"]
    with pytest.raises(NotFound):
        leases.heartbeat("a", {})


def test_what_there_is_not_cannot_drain(leases):
    with pytest.raises(NotFound):
        leases.drain("a").result(10)
    leases.register("a", "g", "grpc://a:1", {}).result(10)
    leases.leave("a").result(10)
    leases.leave("a").result(10)  # a repeat
    with pytest.raises(NotFound):
        leases.drain("a").result(10)


def test_the_gone_are_forgotten_in_time(store, leases):
    leases.register("a", "g", "grpc://a:1", {}).result(10)
    leases.register("b", "g", "grpc://b:1", {}).result(10)
    leases.leave("a").result(10)
    assert leases.prune(0.0).result(10) == 0
    assert leases.prune(1e12).result(10) == 1
    assert len(leases.held()) == 1


def test_a_waiter_that_is_cancelled_leaves_the_write(store, leases, caplog):
    """As a service that ends while it drops a replica: the write goes on, and nothing is left to complain of."""
    leases.register("a", "g", "grpc://a:1", {}).result(10)
    gone = threading.Event()
    store.submit(lambda _: gone.wait(10))
    write = leases.leave("a")
    assert not write.cancel()
    gone.set()
    write.result(10)
    assert leases.held() == []
    assert not caplog.records


def test_what_follows_a_write_and_fails_is_told(leases):
    written: Future[int] = Future()
    found = leases._then(written, lambda _: 1 // 0)
    written.set_result(0)
    with pytest.raises(ZeroDivisionError):
        found.result(10)
