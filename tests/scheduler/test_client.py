"""A run's line to the scheduler: what it tells and hears, with the service there, away, and back."""

from __future__ import annotations

import contextlib
import json
import time

import pytest

from megapd.config import AdaptiveConfig, EqualConfig, OneShotConfig, SchedulerConfig
from megapd.errors import UserError
from megapd.schedule.changes import ChangeLog
from megapd.schedule.plan import LivePlan, resolved
from megapd.schedule.policies import build_plan
from megapd.scheduler.client import changes as client
from megapd.scheduler.client.changes import ServiceSource
from megapd.scheduler.client.http import Api
from megapd.scheduler.client.registration import Registration
from megapd.scheduler.store import Store
from tests.scheduler import services

pytestmark = pytest.mark.slow

THERE = tuple(range(10, 110, 10))
STEPS, AHEAD = 1000, 2
EQUAL = EqualConfig(checkpoints=4, steps=200)
ADAPTIVE = AdaptiveConfig(teachers=(10, 20, 40), window=1, min_dwell=1, max_dwell=20, lead=4, metric="accuracy")


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(client, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(client, "START_SECONDS", 0.3)
    monkeypatch.setattr(client, "CLOSE_SECONDS", 2.0)


@pytest.fixture
def service(tmp_path):
    with contextlib.closing(services.Process(f"sqlite:///{tmp_path}/s.db")) as process:
        yield process


class Run:
    """What rank 0 of a run does."""

    def __init__(self, folder, url, schedule=EQUAL, *, name="student", step=0, token=None, trajectory=None, weights=None):
        def resolve(wanted):
            return build_plan(wanted, available=THERE, steps=STEPS)

        self.folder = folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.changes = ChangeLog(self.folder / "changes.json", "r")
        self.plan = None
        if schedule is not None:
            self.plan = LivePlan(resolved(1, 0, schedule, resolve(schedule)), STEPS, self.changes.changes)
        registration = Registration(name, STEPS, trajectory, None, {"model": "mlp"}, schedule)
        api = Api(SchedulerConfig(url=url, token=token), timeout_seconds=2.0)
        weights = weights or (lambda step: None)
        self.source = ServiceSource(api, registration, self.plan, self.changes, resolve, weights, ahead=AHEAD)
        self.step, known = step, len(self.changes.changes)
        self.source.start(step, self.folder / "metrics.jsonl")
        self.started = list(self.changes.changes[known:])

    def go(self, until: int, *, pause: float = 0.0, **metrics: float) -> list:
        """Steps up to `until`, the metrics of an evaluation reported after each tenth; the changes taken in."""
        taken = []
        while self.step < until:
            change = self.source.next(self.step)
            if change is not None:
                self.plan.take(change)
                taken.append((self.step, change))
            if self.plan is not None:
                self.plan.checkpoint_at(min(self.step + AHEAD, STEPS - 1))
            self.step += 1
            if self.step % 10 == 0:
                self.source.report("train", self.step, {"loss": 1.0, "accuracy": 0.25, "lr": float("nan")})
                self.source.report("eval", self.step, {"loss": 2.0, **metrics})
            time.sleep(pause)
        return taken

    def close(self) -> None:
        self.source.close()


def closing(*arguments, **more):
    return contextlib.closing(Run(*arguments, **more))


def test_a_run_registers_and_reports(service, tmp_path):
    with closing(tmp_path, service.url) as run:
        assert run.started == []
        assert run.go(30, accuracy=0.5) == []
    with service.http() as http:
        assert http.get("/v1/runs/student").json()["step"] == 30
        (schedule,) = http.get("/v1/runs/student/schedules").json()
        assert schedule["document"] == EQUAL.model_dump(mode="json")
        reports = http.get("/v1/runs/student/reports").json()
    assert [report["step"] for report in reports] == [10, 20, 30]
    assert reports[0]["metrics"] == {"loss": 1.0, "train_accuracy": 0.25, "heldout_loss": 2.0, "accuracy": 0.5}


def test_runs_without_a_teacher_report_too(service, tmp_path):
    with closing(tmp_path, service.url, None) as run:
        run.go(20)
    with service.http() as http:
        assert http.get("/v1/runs/student").json()["step"] == 20
        assert http.get("/v1/runs/student/schedules").json() == []


def test_a_new_version_begins_at_its_step_or_as_soon_as_it_can(service, tmp_path):
    with service.http() as http, closing(tmp_path, service.url) as run:
        run.go(10)
        set_schedule(http, 1, 500, 70)
        ((at, first),) = run.go(40, pause=0.02)
        assert (first.version, first.start, first.rotations) == (2, 500, ((0, 70),))
        set_schedule(http, 2, 41, 80)
        taken = run.go(300, pause=0.002)
        (at, second) = taken[0]
        assert len(taken) == 1
        assert second.version == 3
        assert second.start == max(41, at + AHEAD + 1)
        assert [run.plan.version_at(step).version for step in (second.start - 1, second.start, 600)] == [1, 3, 3]
        waiting(lambda: http.get("/v1/runs/student/schedule").json()["applied"] == second.start)
    assert ChangeLog(run.folder / "changes.json", "r").changes == (first, second)
    # A resumed run has them from its folder, with the service gone.
    service.kill()
    with closing(tmp_path, service.url, step=200) as again:
        assert again.started == []
        assert again.plan.rotations() == run.plan.rotations()
    service.start()


def test_the_service_is_away_for_the_whole_run(tmp_path, caplog):
    with closing(tmp_path, "http://127.0.0.1:9") as run:
        start = time.monotonic()
        run.go(STEPS)
        assert time.monotonic() - start < 5.0
    assert caplog.text.count("does not answer") == 1
    assert run.plan.rotations() == build_plan(EQUAL, available=THERE, steps=STEPS).rotations()


def test_what_was_measured_meanwhile_is_told_when_the_service_is_back(service, tmp_path, caplog):
    with closing(tmp_path, service.url) as run:
        run.go(20, pause=0.01)
        service.kill()
        run.go(60, pause=0.01)
        service.start()
        with service.http() as http:
            waiting(lambda: [r["step"] for r in http.get("/v1/runs/student/reports").json()] == [10, 20, 30, 40, 50])
            assert http.get("/v1/runs/student").json()["step"] == 59  # what it had done when it told the last of them
            set_schedule(http, 1, 61, 90)
            assert [change.rotations for _, change in run.go(90, pause=0.02)] == [((0, 90),)]
    assert caplog.text.count("the run goes on with the schedule that it knows") == 1
    assert caplog.text.count("answers again") == 1


def test_the_service_decides_and_a_resumed_run_decides_the_same(service, tmp_path):
    with closing(tmp_path, service.url, ADAPTIVE) as run:
        taken = run.go(120, accuracy=0.5)
    made = [change for _, change in taken]
    assert [(d.sequence, d.checkpoint, d.effective) for d in made] == [(0, 20, 24), (1, 40, 54)]
    assert [at for at, _ in taken] == [20, 50]  # with the report itself: it was waited for
    with service.http() as http:
        stored = http.get("/v1/runs/student/decisions").json()
    assert [(d["sequence"], d["checkpoint"], d["effective"], d["applied"]) for d in stored] == [
        (0, 20, 24, None),
        (1, 40, 54, None),
    ]
    assert stored[0]["evidence"] == made[0].evidence
    # From a checkpoint before the second decision: both are on record, and the same reports change nothing.
    with closing(tmp_path, service.url, ADAPTIVE, step=30) as again:
        assert again.plan.rotations() == run.plan.rotations()
        assert again.go(120, accuracy=0.9) == []
    # From a folder that lacks them, as a crash between the service's commit and the run's record leaves it.
    (run.folder / "changes.json").unlink()
    with closing(tmp_path, service.url, ADAPTIVE, step=10) as third:
        assert third.started == made


def test_a_decision_that_comes_late_begins_late_on_both_sides(service, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "DECIDE_SECONDS", 0.05)
    with closing(tmp_path, service.url, ADAPTIVE) as run:
        run.go(10, accuracy=0.5)
        service.process.send_signal(19)  # SIGSTOP: connections are taken, nothing is answered
        run.go(60, accuracy=0.5)
        service.process.send_signal(18)
        taken = run.go(400, pause=0.01, accuracy=0.5)
        assert taken
        at, first = taken[0]
        assert (first.sequence, first.checkpoint) == (0, 20)
        assert first.effective >= at + AHEAD + 1
        with service.http() as http:
            waiting(lambda: len(http.get("/v1/runs/student/decisions").json()) == 2)
            stored = http.get("/v1/runs/student/decisions").json()
            waiting(lambda: run.plan.decided == 2 or run.go(run.step + 1))
        begins = [d["effective"] if d["applied"] is None else d["applied"] for d in stored]
        assert begins[0] == first.effective
        assert run.plan.rotations() == [(0, 10), (begins[0], 20), (begins[1], 40)]


def test_mistakes_are_told_before_a_run_begins(service, tmp_path):
    with closing(tmp_path, service.url):
        pass
    with pytest.raises(UserError, match=r"another first schedule.*choose another name"):
        Run(tmp_path, service.url, OneShotConfig())
    with contextlib.closing(Store(service.database)) as store:
        services.token(store, "admin")
        read = services.token(store, "read")["Authorization"].split()[1]
    path = tmp_path / "token"
    path.write_text(read)
    with service.http() as http:
        waiting(lambda: http.get("/v1/runs").status_code == 401)  # it asks its store for tokens now and then
    with pytest.raises(UserError, match="bearer token"):
        Run(tmp_path, service.url, name="other")
    with pytest.raises(UserError, match="role"):
        Run(tmp_path, service.url, name="other", token=path)
    with pytest.raises(UserError, match=r"scheduler\.token: .*cannot|No such file"):
        Run(tmp_path, service.url, name="other", token=tmp_path / "nowhere")


def test_a_run_is_held_to_the_registered_trajectory(service, tmp_path):
    with service.http() as http:
        made = http.post("/v1/trajectories", json={"run": "teacher", "location": "/teacher", "name": "teacher"}).json()["digest"]
        for step in THERE:
            body = {"step": step, "location": f"/teacher/{step}", "weights": f"{step:064x}", "files": {}}
            assert http.post(f"/v1/trajectories/{made}/checkpoints", json=body).status_code == 201
    with closing(tmp_path, service.url, trajectory="teacher", weights=lambda step: None if step == 50 else f"{step:064x}"):
        pass
    with pytest.raises(UserError, match=f"step 50 has digest abc, but {50:064x} is registered as scheduler.trajectory teacher"):
        Run(
            tmp_path,
            service.url,
            name="other",
            trajectory="teacher",
            weights=lambda step: "abc" if step == 50 else f"{step:064x}",
        )
    with pytest.raises(UserError, match="none called nothing"):
        Run(tmp_path, service.url, name="third", trajectory="nothing")


def test_a_version_that_the_run_cannot_follow_is_left_aside(service, tmp_path, caplog):
    with service.http() as http, closing(tmp_path, service.url) as run:
        run.go(10)
        set_schedule(http, 1, 20, 15)  # no such checkpoint in the run's trajectory, which the service does not know
        set_schedule(http, 2, 30, 50)
        taken = run.go(200, pause=0.01)
    assert [(change.version, change.rotations) for _, change in taken] == [(3, ((0, 50),))]
    assert (
        "version 2 of the schedule cannot be taken up: schedule.checkpoint: it needs the teacher's checkpoint of step 15"
        in caplog.text
    )


def test_a_run_that_goes_on_tells_what_the_service_missed(service, tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    lines = [{"kind": kind, "step": step, "loss": 0.5, "accuracy": 0.75} for step in (10, 20, 30) for kind in ("train", "eval")]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with closing(tmp_path, service.url, step=20):
        pass
    with service.http() as http:
        reports = http.get("/v1/runs/student/reports").json()
    assert [report["step"] for report in reports] == [10, 20]
    assert reports[0]["metrics"] == {"loss": 0.5, "train_accuracy": 0.75, "heldout_loss": 0.5, "accuracy": 0.75}


def set_schedule(http, expected: int, effective: int, checkpoint: int) -> None:
    document = {"policy": "one_shot", "checkpoint": checkpoint}
    answer = http.put("/v1/runs/student/schedule", json={"expected": expected, "effective": effective, "document": document})
    assert answer.status_code == 201, answer.text


def waiting(found) -> None:
    deadline = time.monotonic() + 15
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)
