"""The examples do what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

from examples import minimal, own_task

pytestmark = pytest.mark.slow


@pytest.mark.full
def test_progressive_distillation_in_one_file(tmp_path, capsys):
    minimal.main(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "steps", "to", "99", "%", "final", "accuracy"]
    runs = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert list(runs) == ["teacher", "labels", "one_shot", "progressive"]
    assert runs["labels"][:2] == runs["one_shot"][:2] == [">", "1500"]
    assert int(runs["teacher"][0]) < int(runs["progressive"][0]) < 1500
    assert float(runs["progressive"][1]) > 0.99
    minimal.main(tmp_path)  # complete: what they came to is in their folders
    assert capsys.readouterr().out.splitlines() == lines


def test_a_task_of_ones_own(tmp_path, capsys):
    own_task.main(tmp_path)
    teacher, student = capsys.readouterr().out.splitlines()
    assert teacher.startswith("teacher  150 steps, held-out accuracy ")
    assert float(teacher.split()[-1]) > 0.95
    assert float(student.split()[-1]) > 0.95


def test_a_metric_of_ones_own_through_a_sweep(tmp_path):
    script = Path(own_task.__file__).with_name("own_metric.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=True)
    assert "progressive - labels:" in done.stdout
    certainty = [float(line.split()[-1]) for line in done.stdout.splitlines() if "certainty" in line]
    assert len(certainty) == 3
    assert 0.2 < certainty[0] < certainty[-1] <= 1
