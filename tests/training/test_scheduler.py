"""Students that the scheduler's service steers: every rank is taught as the record says, through changes, kills and resumes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megapd.cli import main
from megapd.trajectory import Trajectory
from tests.forked import Forked
from tests.scheduler import services
from tests.training import runs

pytestmark = pytest.mark.slow

STEPS = 300
TEACHERS = {"policy": "explicit", "ranges": [{"start": 0, "checkpoint": 50}, {"start": 150, "checkpoint": 100}]}


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory):
    return runs.teacher(tmp_path_factory.mktemp("teacher"), steps=200, every=50)


@pytest.fixture
def service(tmp_path):
    with contextlib.closing(services.Process(f"sqlite:///{tmp_path}/s.db")) as process:
        yield process


class Student:
    """A run of some ranks, `pace` seconds a step at least."""

    def __init__(self, folder: Path, name: str, url: str, ranks: int, *arguments: str, pace: float = 0.05) -> None:
        self.folder, self.ranks, self.name = folder / name, ranks, name
        own = [f"--runs_dir={folder}", f"--name={name}", f"--scheduler.url={url}", "--model.width=8", f"--training.steps={STEPS}"]
        self.arguments = ["train", *runs.COMMON, *own, "--telemetry.every=5", "--training.callbacks=[witness]", *arguments]
        self.environment = {**runs.environment(), "MEGAPD_TEST_PACE": str(pace)}

    def start(self) -> None:
        self.log = self.folder.parent / f"{self.name}.log"
        self.log.touch()
        self.process = Forked("tests.training.scheduler_worker", self.arguments, self.environment, self.log, self.ranks)

    def wait_for(self, step: int) -> None:
        deadline = time.monotonic() + 240
        while runs.last_step(self.folder) < step:
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def end(self) -> None:
        assert self.process.wait(300) == 0, self.said()

    def kill(self) -> None:
        runs.kill_ranks(self.process, self.ranks)

    def said(self) -> str:
        return self.log.read_text()[-5000:]

    def taught(self, rank: int) -> list[tuple[int, str]]:
        """(student step, digest of the teacher) in the order of events: a killed run goes back."""
        lines = map(json.loads, (self.folder / f"taught-{rank}.jsonl").read_text().splitlines())
        return [(step, digest) for step, digest in lines]


def recorded(http, name: str, trajectory: Path) -> dict[int, str]:
    """Of each student step, the digest of the teacher that the service's record names."""
    told = http.get(f"/v1/page/runs/{name}/timeline").json()
    assert told["problem"] == ""
    digests = {step: Trajectory(trajectory).checkpoint(step).digest for step in Trajectory(trajectory).steps}
    return {
        step: digests[segment["checkpoint"]] for segment in told["segments"] for step in range(segment["start"], segment["end"])
    }


def change(capsys, url: str, run: str, *arguments: str) -> str:
    """What `megapd schedule set` printed."""
    assert main(["schedule", "set", run, f"--scheduler.url={url}", *arguments]) == 0
    return capsys.readouterr().out


def test_a_live_change_reaches_both_ranks_at_one_step_and_lasts_through_kills(trajectory, service, tmp_path, capsys):
    url = service.url
    assert main(["trajectory", "import", str(trajectory), "--as", "teacher", f"--scheduler.url={url}"]) == 0
    given = [f"--teacher.trajectory={trajectory}", f"--schedule={TEACHERS}", "--checkpoint.every=40"]
    student = Student(tmp_path, "student", url, 2, *given, "--scheduler.trajectory=teacher")
    student.start()
    student.wait_for(60)
    assert "version 2: one_shot" in change(capsys, url, "student", "--schedule.policy=one_shot", "--schedule.checkpoint=200")
    with service.http() as http:
        runs.until(lambda: http.get("/v1/runs/student/schedule").json()["applied"] is not None)
        applied = http.get("/v1/runs/student/schedule").json()["applied"]
        # Killed before the change begins, or shortly after: what is on record holds.
        student.kill()
        service.kill()
        student.start()  # and the service is away while it resumes
        student.wait_for(applied + 20)
        service.start()
        change(capsys, url, "student", "--schedule.policy=one_shot", "--schedule.checkpoint=150", "--at=280", "--note=back")
        student.end()
        wanted = recorded(http, "student", trajectory)
        versions = http.get("/v1/runs/student/schedules").json()
        reports = http.get("/v1/runs/student/reports").json()
    assert [(v["version"], v["applied"]) for v in versions] == [(1, 0), (2, applied), (3, 280)]
    assert [report["step"] for report in reports] == list(range(5, STEPS + 1, 5))
    for rank in range(2):
        taught = student.taught(rank)
        assert {step for step, _ in taught} == set(range(STEPS))
        assert all(wanted[step] == digest for step, digest in taught)
    rotations = [(line["step"], line["teacher_step"]) for line in runs.metrics(student.folder) if line["kind"] == "rotation"]
    assert rotations == [(0, 50), (applied, 200), (280, 150)]
    assert main(["schedule", "history", "student", f"--scheduler.url={url}"]) == 0
    assert f"version 2: one_shot, begins at student step {versions[1]['effective']}, taken up at" in capsys.readouterr().out


@pytest.mark.full
def test_the_service_decides_for_a_run_that_is_killed(trajectory, service, tmp_path):
    schedule = "{policy: adaptive, teachers: [50, 100, 150, 200], window: 2, min_dwell: 10, max_dwell: 60, lead: 5}"
    given = [f"--teacher.trajectory={trajectory}", f"--schedule={schedule}", "--evaluation.every=10", "--checkpoint.every=25"]
    for name in ("killed", "undisturbed"):
        student = Student(tmp_path, name, service.url, 1, *given, pace=0.01)
        student.start()
        if name == "killed":
            student.wait_for(90)
            student.kill()
            student.start()
        student.end()
    with service.http() as http:
        killed, undisturbed = (http.get(f"/v1/runs/{name}/decisions").json() for name in ("killed", "undisturbed"))
    assert [decision["checkpoint"] for decision in killed] == [100, 150, 200]
    assert killed == undisturbed
    assert runs.metrics(tmp_path / "killed") == runs.metrics(tmp_path / "undisturbed")


# ------------------------------------------------------------------------------------------------------------- a cluster


FOLLOWED, EVERY = 240, 30  # steps of the teacher that trains meanwhile, and between its checkpoints


def process(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("a") as file:
        command = [sys.executable, "-m", "megapd", *arguments]
        return subprocess.Popen(command, env=runs.environment(), stdout=file, stderr=file)


@pytest.fixture
def cluster(service, tmp_path):
    """Two replicas of a teacher that is still training, the registry beside it; ends what is left of them."""
    processes: list[subprocess.Popen[bytes] | Forked] = []
    folder = tmp_path / "teacher"
    teacher = Student(
        tmp_path, "teacher", service.url, 1, f"--trajectory.every={EVERY}", f"--training.steps={FOLLOWED}", pace=0.15
    )
    teacher.start()
    processes.append(teacher.process)
    line = f"--scheduler.url={service.url}"
    processes.append(process(["trajectory", "import", str(folder), "--as", "live", "--watch", line], tmp_path / "import.log"))
    given = [f"--teacher.trajectory={folder}/trajectory", *FOLLOW, line, "--scheduler.group=teachers", "--teacher.server.port=0"]
    replicas = [process(["teacher", *runs.COMMON, *given], tmp_path / f"replica-{number}.log") for number in range(2)]
    processes += replicas
    with service.http() as http:
        runs.until(lambda: len(http.get("/v1/replicas").json()) == 2, 240)
        runs.until(lambda: http.get("/v1/trajectories/live").status_code == 200, 120)
    try:
        yield replicas
    finally:
        for left in processes:
            if left.poll() is None:
                left.kill()
            left.wait(30)


FOLLOW = [f"--schedule={{policy: follow, refresh: {EVERY}, last: {FOLLOWED}, timeout_seconds: 120}}"]


@pytest.mark.full
def test_two_students_follow_a_teacher_that_trains_through_two_replicas(service, cluster, tmp_path, capsys):
    """One student has two ranks, is changed, killed and resumed; one replica is killed on the way."""
    line = ["--scheduler.trajectory=live", "--scheduler.group=teachers", "--teacher.carrier=served", "--checkpoint.every=20"]
    given = [f"--teacher.trajectory={tmp_path}/teacher/trajectory", *FOLLOW, *line]
    pair, single = (Student(tmp_path, name, service.url, ranks, *given) for name, ranks in (("pair", 2), ("single", 1)))
    for student in (pair, single):
        student.start()
    pair.wait_for(70)
    change(capsys, service.url, "pair", "--schedule.policy=one_shot", "--schedule.checkpoint=60")
    with service.http() as http:
        runs.until(lambda: http.get("/v1/runs/pair/schedule").json()["applied"] is not None)
        applied = http.get("/v1/runs/pair/schedule").json()["applied"]
        pair.wait_for(applied + 5)
        pair.kill()
        cluster[0].kill()
        pair.start()
        for student in (pair, single):
            student.end()
        runs.until(lambda: len(http.get("/v1/replicas").json()) == 1, 60)
        trajectory = tmp_path / "teacher" / "trajectory"
        for student in (pair, single):
            wanted = recorded(http, student.name, trajectory)
            for rank in range(student.ranks):
                taught = student.taught(rank)
                assert {step for step, _ in taught} == set(range(STEPS))
                assert all(wanted[step] == digest for step, digest in taught), f"{student.name}, rank {rank}"
        assert [(v["version"], v["applied"]) for v in http.get("/v1/runs/pair/schedules").json()] == [(1, 0), (2, applied)]
        registered = http.get("/v1/trajectories/live/checkpoints").json()
    assert [checkpoint["step"] for checkpoint in registered] == list(range(EVERY, FOLLOWED + 1, EVERY))
    rotations = {
        name: [(r["step"], r["teacher_step"]) for r in runs.metrics(tmp_path / name) if r["kind"] == "rotation"]
        for name in ("pair", "single")
    }
    everything = [(start, start + EVERY) for start in range(0, FOLLOWED, EVERY)]
    assert rotations["single"] == everything
    assert rotations["pair"] == [*(r for r in everything if r[0] < applied), (applied, 60)]
