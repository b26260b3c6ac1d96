"""A package outside the tree is installed, and what it registers trains through `megapd train`."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.training import runs

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parent / "outside"
CONFIG = """
task: {kind: bitcount, length: 6}
model: {kind: signs, width: 6}
optimizer: {lr: 0.01}
training: {steps: 20, global_batch: 16, callbacks: [mean_labelled]}
telemetry: {every: 5, wandb: disabled, progress: false, trackers: [lines]}
trajectory: {every: 10}
evaluation: {samples: 64}
"""
STUDENT = "schedule: {policy: halves}\nteacher: {trajectory: runs/teacher/trajectory}\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs `megapd ARGUMENTS` where the package is installed, in a folder of its own."""
    folder = tmp_path_factory.mktemp("outside")
    wheel = folder / "bitcount-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for path in sorted(SOURCE.rglob("*")):
            if path.suffix != ".pyc" and path.is_file():
                file.write(path, path.relative_to(SOURCE))
        file.writestr("bitcount-1.0.dist-info/RECORD", "")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(folder / "site")]
    subprocess.run([*pip, str(wheel)], check=True)
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(folder / "site"), str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}

    def megapd(*arguments):
        command = [sys.executable, "-m", "megapd", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    return folder, megapd


def test_a_task_a_model_a_policy_a_callback_and_a_tracker_of_another_package_train(installed):
    folder, megapd = installed
    (folder / "teacher.yaml").write_text(CONFIG)
    (folder / "student.yaml").write_text(CONFIG + STUDENT)
    for name in ("teacher", "student"):
        done = megapd("train", f"{name}.yaml", f"--name={name}")
        assert done.returncode == 0, done.stderr
    records = runs.metrics(folder / "runs" / "student")
    assert [(r["step"], r["teacher_step"]) for r in records if r["kind"] == "rotation"] == [(0, 10), (10, 20)]
    assert [r["mean_labelled"] for r in records if r["kind"] == "train"] == [16.0] * 4
    lines = [json.loads(line) for line in (folder / "runs" / "student" / "lines.txt").read_text().splitlines()]
    assert [line[:2] for line in lines] == [[r["kind"], r["step"]] for r in records]
    assert "mean_labelled" in lines[1][2]
    meta = json.loads((folder / "runs" / "student" / "trajectory" / "step_20" / "meta.json").read_text())
    assert meta["config"]["task"] == {"kind": "bitcount", "length": 6, "classes": 3}
    assert meta["config"]["model"] == {"kind": "signs", "initial": None, "width": 6}
    assert "schedule halves: 2 checkpoints over 20 student steps" in megapd("plan", "student.yaml").stdout


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("--task.kind=bitcont", "task.kind: unknown task 'bitcont'; the nearest is 'bitcount'"),
        ("--model.hidden=3", "model.hidden: unknown setting"),
        ("--task.length=0", "task.length: Input should be greater than or equal to 1 (got 0)"),
    ],
)
def test_its_settings_are_checked_as_megapds_own(installed, setting, told):
    folder, megapd = installed
    (folder / "teacher.yaml").write_text(CONFIG)
    done = megapd("plan", "teacher.yaml", setting)
    assert done.returncode == 2
    assert told in done.stderr
