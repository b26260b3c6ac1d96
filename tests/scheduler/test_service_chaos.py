"""kill -9 of the service during writes: nothing that it acknowledged is lost, nothing is there twice."""

from __future__ import annotations

import contextlib
import threading
import time

import httpx
import pytest
from sqlalchemy import select

from megapd.scheduler.store import Store, runs
from megapd.scheduler.store import events as journal
from megapd.scheduler.store import trajectories as catalogue
from megapd.scheduler.store.tables import replicas
from tests.scheduler.services import Process, postgres, postgres_binaries

pytestmark = pytest.mark.slow

WRITERS = 4
KEPT = 10  # acknowledged by all writers together before each kill


class Writer(threading.Thread):
    """One run that registers checkpoints, decisions and replicas one after the other, each repeated until it is acknowledged."""

    def __init__(self, url: str, number: int) -> None:
        super().__init__(daemon=True)
        self.name_ = f"run{number}"
        self._url, self.stopping = url, threading.Event()
        self.acknowledged: list[int] = []
        self.repeats = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with httpx.Client(base_url=self._url, timeout=5.0) as client:
                self._client = client
                self._ask("POST", "/v1/trajectories", {"run": self.name_, "location": "x", "name": self.name_})
                self._ask("PUT", f"/v1/runs/{self.name_}", {"steps": 1 << 40})
                number = 0
                while not self.stopping.is_set():
                    self._one(number)
                    self.acknowledged.append(number)
                    number += 1
        except BaseException as error:
            self.error = error

    def _one(self, number: int) -> None:
        name = self.name_
        record = {"step": number, "location": "x", "weights": f"{number:064x}", "files": {}}
        self._ask("POST", f"/v1/trajectories/{name}/checkpoints", record)
        decision = {"sequence": number, "step": number, "effective": number + 10, "checkpoint": number}
        self._ask("POST", f"/v1/runs/{name}/decisions", {**decision, "reason": "test", "evidence": {"number": number}})
        self._ask("PUT", f"/v1/replicas/{name}-{number}", {"group": name, "endpoint": f"grpc://{name}:{number}"})

    def _ask(self, method: str, path: str, body: dict) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                response = self._client.request(method, path, json=body)
            except httpx.TransportError:
                self.repeats += 1
                assert time.monotonic() < deadline, "the service stays away"
                time.sleep(0.05)
                continue
            if response.status_code == 503:
                time.sleep(0.05)
                continue
            assert response.status_code in (200, 201, 204), f"{method} {path}: {response.status_code} {response.text}"
            return


def check(database: str, writers: list[Writer]) -> None:
    """What the store holds against what was acknowledged; one more of each may be there whose answer was lost."""
    with contextlib.closing(Store(database)) as store:
        live = set(store.read(lambda c: list(c.execute(select(replicas.c.id).where(replicas.c.state == "live")).scalars())))
        events = store.read(lambda c: journal.events_after(c, 0, 1 << 30))
        for writer in writers:
            name, count = writer.name_, len(writer.acknowledged)
            digest = store.read(lambda c, name=name: catalogue.resolve(c, name))
            steps = store.read(lambda c, digest=digest: catalogue.steps_of(c, digest))
            decided = store.read(lambda c, name=name: runs.list_decisions(c, name))
            leases = sorted(int(id.removeprefix(f"{name}-")) for id in live if id.startswith(f"{name}-"))
            for found in (steps, [decision["sequence"] for decision in decided], leases):
                assert found == list(range(len(found)))  # none lost in between, none doubled
                assert count <= len(found) <= count + 1
            assert all(decision["evidence"] == {"number": decision["sequence"]} for decision in decided)
            listed = store.read(lambda c, name=name: runs.assignment(c, name))
            assert (listed["version"], len(listed["endpoints"])) == (len(leases), len(leases))
    for kind, key in (("decision", "sequence"), ("checkpoint", "checkpoint"), ("replica", "replica")):
        made = [(event["run"], event["body"][key]) for event in events if event["kind"] == kind]
        assert made
        assert len(made) == len(set(made))
    assert [event["id"] for event in events] == sorted({event["id"] for event in events})


def _wait(writers: list[Writer], count: int) -> None:
    """Until that many more are acknowledged."""
    wanted = sum(len(writer.acknowledged) for writer in writers) + count
    deadline = time.monotonic() + 30
    while sum(len(writer.acknowledged) for writer in writers) < wanted and all(writer.is_alive() for writer in writers):
        assert time.monotonic() < deadline, "nothing is acknowledged"
        time.sleep(0.005)


def run(database: str, kills: int) -> None:
    service = Process(database)
    writers = [Writer(service.url, number) for number in range(WRITERS)]
    for writer in writers:
        writer.start()
    try:
        for kill in range(kills):
            _wait(writers, KEPT + kill)
            service.kill()
            service.start()
        _wait(writers, KEPT)
    finally:
        for writer in writers:
            writer.stopping.set()
        for writer in writers:
            writer.join(60)
        code = service.stop()
    for writer in writers:
        assert writer.error is None, writer.error
        assert not writer.is_alive()
    assert code == 0
    assert all(writer.acknowledged for writer in writers)
    assert sum(writer.repeats for writer in writers) >= kills  # the kills fell into writes
    check(database, writers)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.full)])
def test_sqlite_keeps_what_it_acknowledged(tmp_path, kills):
    run(f"sqlite:///{tmp_path}/s.db", kills)


@pytest.mark.skipif(postgres_binaries() is None, reason="needs PostgreSQL's initdb and postgres (Debian: postgresql)")
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.full)])
def test_postgresql_keeps_what_it_acknowledged(kills):
    with postgres() as url:
        run(url, kills)
