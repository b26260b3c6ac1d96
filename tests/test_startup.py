"""What starting the command line does not import: each of these takes from tenths of a second to seconds."""

import subprocess
import sys

import pytest

from tests.trajectory.checkpoints import write

pytestmark = pytest.mark.slow

HEAVY = {"torch", "transformers", "deepspeed", "pyarrow", "sqlalchemy"}


def imported(*command):
    """Names of the modules that `python COMMAND` imports."""
    done = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help(arguments):
    modules = imported("-m", "megapd", *arguments)
    assert "megapd.cli" in modules
    assert not modules & {*HEAVY, "numpy", "pydantic"}


@pytest.mark.parametrize("schedule", ["{policy: equal, checkpoints: 3, steps: 10}", "{policy: transition, steps: 9}"])
def test_plan(tmp_path, schedule):
    for step, loss in ((10, 5.0), (20, 4.9), (30, 2.0), (40, 1.9), (50, 1.8)):
        write(tmp_path / "trajectory", step, metrics={"eval/loss": loss})
    settings = [f"--teacher.trajectory={tmp_path / 'trajectory'}", f"--schedule={schedule}", f"--runs_dir={tmp_path}"]
    modules = imported("-m", "megapd", "plan", *settings)
    assert {"megapd.schedule.policies", "megapd.trajectory.reader"} <= modules
    assert not modules & HEAVY
    assert (tmp_path / "run" / "plots" / "plan.png").exists()


def test_models():
    modules = imported("-c", "import megapd.models")
    assert "megapd.models.transformer" in modules
    assert not modules & {"torch._dynamo", "torch._inductor", "transformers", "deepspeed"}
