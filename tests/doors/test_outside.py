"""A package from outside the tree brings a task, a model, a schedule policy and a callback; all train through `megapd train`."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.training import runs

OUTSIDE = Path(__file__).parent / "outside"
SETTINGS = ["--task.kind=majority", "--model.kind=signs", "--training.global_batch=64", "--optimizer.lr=0.05"]
SETTINGS += ["--telemetry.every=1", "--telemetry.wandb=disabled", "--telemetry.progress=false", "--evaluation.samples=64"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of installed packages with the one of outside/, as pip leaves it there; pip itself may have no network."""
    site = tmp_path_factory.mktemp("site")
    project = tomllib.loads((OUTSIDE / "pyproject.toml").read_text())["project"]
    shutil.copytree(OUTSIDE / "megapd_outside", site / "megapd_outside", ignore=shutil.ignore_patterns("__pycache__"))
    metadata = site / "megapd_outside-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in points.items()), ""])
        for group, points in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(groups))
    return site


def megapd(site, *arguments, code=0):
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{Path.cwd()}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megapd", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_what_a_package_brings_trains(site, tmp_path):
    own = [*SETTINGS, f"--runs_dir={tmp_path}"]
    megapd(site, "train", *own, "--name=teacher", "--training.steps=30", "--trajectory.every=10")
    meta = json.loads((tmp_path / "teacher" / "trajectory" / "step_30" / "meta.json").read_text())
    assert meta["config"]["task"] == {"kind": "majority", "length": 12, "voters": 3}
    assert meta["config"]["model"] == {"kind": "signs", "length": 12}

    taught = [f"--teacher.trajectory={tmp_path / 'teacher' / 'trajectory'}", "--schedule.policy=alternate", "--schedule.every=4"]
    steps = ["--name=student", "--training.steps=12", "--training.callbacks=[rotations]"]
    megapd(site, "train", *own, *taught, *steps)
    records = runs.metrics(tmp_path / "student")
    rotations = [[0, 10], [4, 30], [8, 10]]
    assert [[r["step"], r["teacher_step"]] for r in records if r["kind"] == "rotation"] == rotations
    assert json.loads((tmp_path / "student" / "rotations.json").read_text()) == rotations
    assert records[-1]["kind"] == "eval"
    assert records[-1]["accuracy"] > 0.6

    assert "schedule alternate: 2 checkpoints over 12 student steps" in megapd(site, "plan", *own, *taught, *steps)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("--task.kind=majorty", "task.kind: unknown task 'majorty'; the nearest is 'majority'"),
        ("--model.width=3", "model.width: unknown setting"),
        ("--task.voters=0", "task.voters: Input should be greater than or equal to 1 (got 0)"),
    ],
)
def test_mistakes_are_told_as_in_megapds_own_sections(site, setting, told):
    assert told in megapd(site, "plan", *SETTINGS, setting, code=2)
