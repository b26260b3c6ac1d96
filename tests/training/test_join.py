"""How the ranks of a run come to one plan, of what is on record and what the scheduler tells rank 0."""

from __future__ import annotations

import contextlib
import copy
import time
from dataclasses import dataclass, field

import pytest

from megapd.cli import main
from megapd.config import Config, SchedulerConfig, load
from megapd.errors import UserError
from megapd.schedule.changes import FILE, ChangeLog
from megapd.schedule.plan import Plan, Version
from megapd.schedule.record import ScheduleRecord
from megapd.training import Callback, train
from megapd.training import changes as changes_module
from megapd.training.changes import open_changes
from megapd.trajectory import Checkpoint
from megapd.world import World as AllRanks
from tests.scheduler import services
from tests.training import runs as training

pytestmark = pytest.mark.slow

PINNED = Version(2, 53, "one_shot", ((0, 20),))


@dataclass
class World:
    """One rank of two, after the other: what rank 0 gave to each collective is what rank 1 finds there."""

    rank: int
    size = 2
    given: list = field(default_factory=list)

    def gather(self, value):
        if self.rank == 0:
            self.given.append(copy.deepcopy(value))
            return [value, None]
        return [self.given.pop(0), value]

    on_first = AllRanks.on_first


@pytest.fixture
def config(tmp_path):
    schedule = {"policy": "one_shot", "checkpoint": 10}
    tree = {"runs_dir": tmp_path, "name": "student", "teacher": {"trajectory": str(tmp_path)}, "schedule": schedule}
    return Config(**tree, scheduler={"url": "http://127.0.0.1:9"}, training={"steps": 100})


PLAN = Plan("one_shot", 100, ((0, 10),))


def test_a_rank_that_is_late_does_not_find_what_rank_0_wrote_meanwhile(config, monkeypatch):
    class Source:
        def __init__(self, api, run, plan, log, *rest, ahead) -> None:
            self.plan, self.log, self.registered = plan, log, {10: "abc"}

        def start(self, step, metrics):
            self.log.append(PINNED)
            self.plan.take(PINNED)

    monkeypatch.setattr(changes_module, "ServiceSource", Source)
    first = World(0)
    plans = []
    for world in (first, World(1, first.given)):
        opened = open_changes(config, PLAN, None, world, run="r", step=40, known=0, rests={})
        plans.append(opened.plan.rotations())
        assert opened.registered == {10: "abc"}
        assert (opened.source is None) == (world.rank > 0)
    assert plans == [[(0, 10), (53, 20)]] * 2


def resumed(config, world, *, step=60, known):
    """The plan of a run that names no scheduler any more."""
    opened = open_changes(config, PLAN, None, world, run="r", step=step, known=known, rests={})
    assert opened.source is None
    return opened.plan


def test_what_the_scheduler_changed_lasts_without_its_url(config):
    config = config.model_copy(update={"scheduler": SchedulerConfig()})
    plan = resumed(config, World(0), step=40, known=0)
    assert (plan.rotations(), plan.known) == (PLAN.rotations(), 0)
    first = World(0)
    for world in (first, World(1, first.given)):  # all ranks say so together
        with pytest.raises(UserError, match=r"first 1 changes in changes\.json, .* are gone"):
            resumed(config, world, known=1)
    log = ChangeLog(config.folder / FILE, "r")
    log.append(PINNED)
    first = World(0)
    for world in (first, World(1, first.given)):
        plan = resumed(config, world, known=1)
        assert plan.rotations() == [(0, 10), (53, 20)]
        assert plan.known == 1
    log.append(Version(3, 80, "adaptive", ((0, 20),), grows=True))
    with pytest.raises(UserError, match=r"scheduler\.url: the scheduler decides for this run .* restore reports\.jsonl"):
        resumed(config, World(0), known=2)


def test_a_teacher_is_held_to_the_registered_one_when_it_begins(tmp_path):
    record = ScheduleRecord(tmp_path / "schedule.json", PLAN, run="r", resumed=False, writes=True, registered={10: "abc"})
    checkpoint = Checkpoint(step=10, path=tmp_path, digest="def", files={}, vocabulary="", config={}, metrics={})
    with pytest.raises(UserError, match=r"its digest is def, but abc is registered for that step as scheduler\.trajectory"):
        record.confirm(checkpoint)


def test_a_killed_run_goes_on_without_the_service_that_changed_it(tmp_path, monkeypatch):
    trajectory = training.teacher(tmp_path, steps=30, every=5)
    given = training.student(tmp_path, "student", trajectory, "--telemetry.every=1", "--checkpoint.every=4")
    monkeypatch.setattr("megapd.scheduler.client.changes.POLL_SECONDS", 0.01)
    with contextlib.closing(services.Process(f"sqlite:///{tmp_path}/s.db")) as service, service.http() as http:

        class Changed(Callback):
            def after_step(self, run, result):
                if result.step == 8:
                    body = {"expected": 1, "effective": None, "document": {"policy": "one_shot", "checkpoint": 30}}
                    training.until(lambda: http.put("/v1/runs/student/schedule", json=body).status_code == 201)
                if run.teaching.plan.known:
                    training.until(lambda: http.get("/v1/runs/student/schedule").json()["applied"] is not None)
                if result.step >= 16 and run.teaching.plan.known:
                    raise KeyboardInterrupt
                time.sleep(0.05)

        with pytest.raises(KeyboardInterrupt):
            train(load(None, [*given[1:], f"--scheduler.url={service.url}"]), [Changed()])
        applied = http.get("/v1/runs/student/schedule").json()["applied"]
    assert main(given) == 0
    rotations = [
        (line["step"], line["teacher_step"]) for line in training.metrics(tmp_path / "student") if line["kind"] == "rotation"
    ]
    assert rotations == [*((start, start + 5) for start in range(0, applied, 5)), (applied, 30)]
