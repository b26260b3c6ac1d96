"""A student whose schedule decides as it learns: every rotation is on record, and a killed run decides as an undisturbed one."""

import json

import pytest

from megapd.cli import main
from tests.training import runs

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
    lines = [json.loads(line) for line in (run / "decisions.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "decision"]


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


@pytest.mark.full
def test_killed_ranks_decide_as_undisturbed_ones(trajectory, tmp_path):
    runs.run(arguments(tmp_path, "undisturbed", trajectory))
    killed = tmp_path / "killed"
    for step in (40, 90):
        runs.launch_and_kill(arguments(tmp_path, "killed", trajectory), 2, killed, step)
    runs.run(arguments(tmp_path, "killed", trajectory))
    assert runs.metrics(killed) == runs.metrics(tmp_path / "undisturbed")
    assert decisions(killed) == decisions(tmp_path / "undisturbed")
