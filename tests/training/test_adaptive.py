"""A student whose schedule decides as it learns: every rotation is on record, and a killed run decides as an undisturbed one."""

import fcntl
import json
import shutil

import pytest

from megapd.cli import main
from tests.training import runs

pytestmark = pytest.mark.slow

STEPS = 200
ADAPTIVE = [
    "--schedule={policy: adaptive, teachers: [50, 100, 150, 200], window: 2, min_dwell: 10, max_dwell: 60, lead: 5}",
    f"--training.steps={STEPS}",
    "--evaluation.every=10",
    "--checkpoint.every=25",
]


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory):
    return runs.teacher(tmp_path_factory.mktemp("teacher"), steps=STEPS, every=50)


def arguments(folder, name, trajectory):
    own = [f"--runs_dir={folder}", f"--name={name}", f"--teacher.trajectory={trajectory}", "--model.width=8"]
    return ["train", *runs.COMMON, *own, *ADAPTIVE]


def decisions(run):
    changes = json.loads((run / "changes.json").read_text())["changes"]
    assert {change["kind"] for change in changes} <= {"decision"}
    return changes


def test_rotations_are_those_that_were_decided(trajectory, tmp_path):
    assert main(arguments(tmp_path, "student", trajectory)) == 0
    made = decisions(tmp_path / "student")
    assert [decision["checkpoint"] for decision in made] == [100, 150, 200]
    rotations = [(r["step"], r["teacher_step"]) for r in runs.metrics(tmp_path / "student") if r["kind"] == "rotation"]
    assert rotations == [(0, 50), *((decision["effective"], decision["checkpoint"]) for decision in made)]
    assert all(decision["effective"] == decision["step"] + 5 for decision in made)
    taught = {r["step"]: r["teacher_step"] for r in runs.metrics(tmp_path / "student") if r["kind"] == "train"}
    for start, checkpoint in rotations:
        assert taught[start + 1] == checkpoint


def test_a_lead_shorter_than_what_is_asked_ahead_is_refused(trajectory, tmp_path, capsys):
    assert main([*arguments(tmp_path, "student", trajectory), "--training.prefetch=5"]) == 2
    assert "schedule.lead" in capsys.readouterr().err


def test_a_run_begun_before_reports_and_decisions_had_files_of_their_own(trajectory, tmp_path):
    """Its decisions.jsonl is read once; it ends as if it had begun today."""
    given, run = [*arguments(tmp_path, "student", trajectory), "--checkpoint.keep=10"], tmp_path / "student"
    assert main(given) == 0
    wanted = runs.metrics(run), decisions(run), (run / "reports.jsonl").read_text()
    subject, *lines = (run / "reports.jsonl").read_text().splitlines(keepends=True)
    of_step = {decision["step"]: json.dumps(decision) + "\n" for decision in decisions(run)}
    before = [subject.replace("megapd-reports", "megapd-decisions")]
    for line in lines[:12]:  # killed at step 120, beyond the checkpoint of step 100
        before += [line, of_step.get(json.loads(line)["step"], "")]
    (run / "decisions.jsonl").write_text("".join(before))
    for path in (run / "reports.jsonl", run / "changes.json"):
        path.unlink()
    for step in range(125, STEPS + 1, 25):
        shutil.rmtree(run / "checkpoints" / f"step_{step}")
    assert main(given) == 0
    assert (runs.metrics(run), decisions(run), (run / "reports.jsonl").read_text()) == wanted
    assert not (run / "decisions.jsonl").exists()


def test_a_run_that_decides_by_itself_cannot_have_the_scheduler_decide(trajectory, tmp_path, capsys):
    given = arguments(tmp_path, "student", trajectory)
    assert main(given) == 0
    assert main([*given, "--scheduler.url=http://127.0.0.1:9"]) == 2
    assert "leave scheduler.url out" in capsys.readouterr().err


def test_a_second_process_of_the_run_is_refused(trajectory, tmp_path, capsys):
    given = arguments(tmp_path, "student", trajectory)
    (tmp_path / "student").mkdir()
    with (tmp_path / "student" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(given) == 2
    assert "another process trains this run" in capsys.readouterr().err


@pytest.mark.full
def test_killed_ranks_decide_as_undisturbed_ones(trajectory, tmp_path):
    runs.run(arguments(tmp_path, "undisturbed", trajectory))
    killed = tmp_path / "killed"
    for step in (40, 90):
        runs.start_and_kill(arguments(tmp_path, "killed", trajectory), 2, killed, step)
    runs.run(arguments(tmp_path, "killed", trajectory))
    assert runs.metrics(killed) == runs.metrics(tmp_path / "undisturbed")
    assert decisions(killed) == decisions(tmp_path / "undisturbed")
