"""A run's line to the scheduler where things go wrong: crashes between two writes, lost databases, strange answers."""

from __future__ import annotations

import contextlib
import json
import time

import httpx
import pytest

from megapd.config import SchedulerConfig
from megapd.errors import UserError
from megapd.schedule.changes import ChangeLog
from megapd.schedule.plan import LivePlan, Version, resolved
from megapd.schedule.policies import build_plan
from megapd.scheduler.client import changes as client
from megapd.scheduler.client.changes import ServiceSource
from megapd.scheduler.client.http import Api, Away, Refusal
from megapd.scheduler.client.registration import Registration
from tests.scheduler import services
from tests.scheduler.test_client import ADAPTIVE, AHEAD, EQUAL, STEPS, THERE
from tests.teacher.serving import make_authority

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(client, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(client, "START_SECONDS", 0.1)
    monkeypatch.setattr(client, "CLOSE_SECONDS", 2.0)


@pytest.fixture
def http(tmp_path):
    """A service in this process."""
    with services.client(tmp_path) as found:
        yield found


class Line(Api):
    """To a service in this process; `before(method, path, body)` may raise, or answer in its place."""

    def __init__(self, http) -> None:
        super().__init__(SchedulerConfig(url="http://127.0.0.1:1"))
        self.http, self.before = http, lambda method, path, body: None

    def answer(self, method, path, body=None):
        instead = self.before(method, path, body)
        if instead is not None:
            return 200, instead
        self._client, own = self.http, self._client
        try:
            return super().answer(method, path, body)
        finally:
            self._client = own


class Run:
    """What rank 0 of a run does."""

    def __init__(self, folder, line, schedule=EQUAL, *, step=0):
        self.folder, self.line, self.step = folder / "student", line, step
        self.folder.mkdir(exist_ok=True)
        self.changes = ChangeLog(self.folder / "changes.json", "r")

        def resolve(wanted):
            return build_plan(wanted, available=THERE, steps=STEPS)

        self.plan = LivePlan(resolved(1, 0, schedule, resolve(schedule)), STEPS, self.changes.changes)
        registration = Registration("student", STEPS, None, None, {}, schedule)
        self.source = ServiceSource(line, registration, self.plan, self.changes, resolve, lambda step: None, ahead=AHEAD)
        known = len(self.changes.changes)
        self.source.start(step, self.folder / "metrics.jsonl")
        self.started = list(self.changes.changes[known:])

    def go(self, until, *, pause=0.0, **metrics):
        taken = []
        while self.step < until:
            change = self.source.next(self.step)
            if change is not None:
                self.plan.take(change)
                taken.append(change)
            self.plan.checkpoint_at(min(self.step + AHEAD, STEPS - 1))
            self.step += 1
            if metrics and self.step % 10 == 0:
                self.source.report("eval", self.step, metrics)
            time.sleep(pause)
        return taken

    def close(self) -> None:
        self.source.close()


def running(*arguments, **more):
    return contextlib.closing(Run(*arguments, **more))


def put(http, expected, effective, checkpoint=70):
    document = {"policy": "one_shot", "checkpoint": checkpoint}
    body = {"expected": expected, "effective": effective, "document": document}
    assert http.put("/v1/runs/student/schedule", json=body).status_code == 201


def versions(http):
    return [(v["version"], v["applied"]) for v in http.get("/v1/runs/student/schedules").json()]


def waiting(found) -> None:
    deadline = time.monotonic() + 15
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------------- crash points


def test_what_a_power_cut_left_of_metrics_does_not_stop_a_resumed_run(http, tmp_path):
    (tmp_path / "student").mkdir()
    line = json.dumps({"kind": "eval", "step": 10, "accuracy": 0.5})
    (tmp_path / "student" / "metrics.jsonl").write_bytes(f"{line}\n".encode() + b'{"kind": "eval", "st\xff')
    with running(tmp_path, Line(http), step=10):
        pass
    assert [report["step"] for report in http.get("/v1/runs/student/reports").json()] == [10]


def test_a_beginning_that_a_crash_kept_from_the_service_is_told_again(http, tmp_path):
    with running(tmp_path, Line(http)):
        put(http, 1, 41)
    # The run took it up at 53, wrote that down, and was killed before it said so.
    ChangeLog(tmp_path / "student" / "changes.json", "r").append(Version(2, 53, "one_shot", ((0, 70),)))
    with running(tmp_path, Line(http), step=50) as run:
        waiting(lambda: versions(http) == [(1, 0), (2, 53)])
        assert run.started == []


def test_a_change_is_on_record_before_the_service_hears_so(http, tmp_path):
    known = []

    def before(method, path, body):
        if path.endswith("/applied"):
            known.append([change.start for change in ChangeLog(tmp_path / "student" / "changes.json", "r").changes])

    line = Line(http)
    line.before = before
    with running(tmp_path, line) as run:
        append, run.changes.append = run.changes.append, lambda change: (time.sleep(0.3), append(change))[1]
        put(http, 1, 41)
        (change,) = run.go(200, pause=0.005)
        waiting(lambda: known)
    assert known == [[change.start]]


def test_a_late_report_does_not_hide_those_that_were_not_told(http, tmp_path):
    with running(tmp_path, Line(http)):
        pass
    # Told at step 59, after the service had been away; killed before the next could be.
    assert http.post("/v1/runs/student/reports", json={"step": 20, "now": 59, "metrics": {"accuracy": 0.5}}).status_code == 201
    lines = [json.dumps({"kind": "eval", "step": step, "accuracy": 0.5}) for step in range(10, 60, 10)]
    (tmp_path / "student" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with running(tmp_path, Line(http), step=55):
        pass
    assert [report["step"] for report in http.get("/v1/runs/student/reports").json()] == [20, 30, 40, 50]


# ------------------------------------------------------------------------------------------------------------ lost databases


def test_a_service_that_lost_what_taught_the_run_is_refused_at_its_start(http, tmp_path):
    (tmp_path / "student").mkdir()
    ChangeLog(tmp_path / "student" / "changes.json", "r").append(Version(2, 53, "one_shot", ((0, 70),)))
    with pytest.raises(
        UserError, match=r"version 2 .*from student step 53 on, but the scheduler has none; restore scheduler.data"
    ):
        Run(tmp_path, Line(http), step=60)


def test_a_service_that_loses_its_database_meanwhile(http, tmp_path, caplog):
    """Without changes the run registers again and hears of new ones; with some it goes on with them, and waits for nothing."""
    (tmp_path / "other").mkdir()
    (tmp_path / "third").mkdir()
    line = Line(http)
    with services.client(tmp_path / "other") as other, services.client(tmp_path / "third") as third:
        with running(tmp_path, line, ADAPTIVE) as run:
            run.go(15, pause=0.01, accuracy=0.5)
            line.http = other
            # Registered, and its schedule with it: a new one is refused before there is one that it replaces.
            waiting(lambda: other.get("/v1/runs/student").status_code == 200 and versions(other) == [(1, 0)])
            put(other, 1, 100)
            waiting(lambda: run.plan.version == 2 or run.go(run.step + 1))
            waiting(lambda: versions(other) == [(1, 0), (2, 100)])
            line.http = third
            waiting(lambda: "the scheduler has none" in caplog.text)
            start = time.monotonic()
            assert run.go(99, accuracy=0.5) == []
            assert time.monotonic() - start < 2.0
        assert third.get("/v1/runs/student/decisions").json() == []
    assert caplog.text.count("the scheduler has none") == 1


# ----------------------------------------------------------------------------------------------------------- strange answers


@pytest.mark.parametrize("garbage", [{}, [], "ok", {"step": None, "schedule_version": {}, "decisions": 0}])
def test_garbage_counts_as_no_answer(http, tmp_path, caplog, garbage):
    line = Line(http)
    line.before = lambda *_: garbage
    with running(tmp_path, line, ADAPTIVE) as run:
        assert "as no scheduler does; is it one?" in caplog.text
        line.before = lambda *_: None
        waiting(lambda: http.get("/v1/runs/student").status_code == 200)
        waiting(lambda: versions(http) == [(1, 0)])
        line.before = lambda *_: garbage
        start = time.monotonic()
        run.go(60, accuracy=0.5)
        assert time.monotonic() - start < 3.0
        line.before = lambda *_: None
        waiting(lambda: len(http.get("/v1/runs/student/reports").json()) == 5)


def test_redirects_are_told_and_not_followed():
    api = Api(SchedulerConfig(url="http://127.0.0.1:1"))
    api._client = httpx.Client(
        base_url=api.url, transport=httpx.MockTransport(lambda _: httpx.Response(308, headers={"location": "https://elsewhere"}))
    )
    with pytest.raises(Away, match=r"scheduler.url: .* redirects to https://elsewhere; name the scheduler itself"):
        api.ask("GET", "/v1/runs")


def test_a_url_that_is_none_names_the_setting():
    with pytest.raises(UserError, match=r"scheduler\.url: http://host:port"):
        Api(SchedulerConfig(url="http://host:port"))


def test_a_token_crosses_no_network_in_the_clear(tmp_path):
    """Of runs, replicas and commands alike: all of them call by Api."""
    file, root = tmp_path / "token", make_authority(tmp_path / "tls").root
    file.write_text("megapd_x")
    for settings, problem in (
        ({"url": "http://10.1.2.3:8480", "token": file}, r"scheduler\.token: .*in the clear; name https://.*scheduler\.insecure"),
        ({"url": "http://10.1.2.3", "root_certificate": root}, r"scheduler\.root_certificate: http://10\.1\.2\.3 is without TLS"),
        ({"url": "http://localhost", "root_certificate": root}, r"scheduler\.root_certificate"),
    ):
        with pytest.raises(UserError, match=problem):
            Api(SchedulerConfig(**settings))
    for settings in (
        {"url": "http://10.1.2.3"},
        {"url": "http://10.1.2.3", "token": file, "insecure": True},
        {"url": "http://localhost:1", "token": file},
        {"url": "https://10.1.2.3", "token": file, "root_certificate": root},
    ):
        Api(SchedulerConfig(**settings)).close()
    for odd in ("http://user:word@host", "http://127.0.0.1\\@host"):
        with pytest.raises(ValueError, match="give http://HOST:PORT"):
            SchedulerConfig(url=odd)


def test_a_revoked_token_costs_the_run_no_time_and_no_report(http, tmp_path, caplog):
    line = Line(http)

    def refused(*_):
        raise Refusal("scheduler: authorization: a bearer token is needed", 401, None)

    with running(tmp_path, line, ADAPTIVE) as run:
        run.go(5)
        line.before = refused
        start = time.monotonic()
        run.go(80, pause=0.01, accuracy=0.5)
        assert time.monotonic() - start < 5.0
        assert caplog.text.count("a bearer token is needed") == 1
        line.before = lambda *_: None
        waiting(lambda: [r["step"] for r in http.get("/v1/runs/student/reports").json()] == [10, 20, 30, 40, 50, 60, 70])


def test_only_the_metric_that_decides_is_waited_for(http, tmp_path):
    with running(tmp_path, Line(http), ADAPTIVE) as run:
        run.source.report("train", 10, {"loss": 1.0, "accuracy": 0.5})
        assert run.source._flush() is None
        run.source.report("train", 20, {"loss": 1.0})
        run.source.report("eval", 20, {"accuracy": 0.5})
        assert run.source._flush() is not None


# --------------------------------------------------------------------------------------------------------------- a run's end


def test_the_record_says_what_never_taught(http, tmp_path):
    with running(tmp_path, Line(http), step=990) as run:
        put(http, 1, 20, 15)  # no such checkpoint
        run.go(998, pause=0.05)
        put(http, 2, 998)  # signals are asked for up to there
        assert run.go(STEPS, pause=0.05, accuracy=0.5) == []
    assert versions(http) == [(1, 0), (2, STEPS), (3, STEPS)]
    with running(tmp_path, Line(http), step=STEPS) as run:  # started again when it is done
        assert run.started == []


def test_a_decision_that_the_run_did_not_live_to_hear_never_taught(http, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "DECIDE_SECONDS", 0.0)
    line = Line(http)
    answered = []

    def slow(method, path, body):
        if path.endswith("/reports"):
            answer = http.post(path, json=body).json()
            answered.append(answer["decision"])
            time.sleep(0.3)
            return answer

    line.before = slow
    with running(tmp_path, line, ADAPTIVE, step=980) as run:
        run.go(990, accuracy=0.5)
        run.source._flush()
        waiting(lambda: answered)
        run.source.report("eval", STEPS, {"accuracy": 0.5})
    (decision,) = http.get("/v1/runs/student/decisions").json()
    assert (decision["effective"], decision["applied"]) == (994, STEPS)
