"""The known faults of published trajectories: the data, and what a schedule that uses one is told."""

import re

import pytest

from megapd.config import load
from megapd.schedule.resolve import resolve_plan
from megapd.trajectory.hugging_face import HuggingFaceTrajectory
from megapd.trajectory.known_faults import known_fault_warnings, known_faults


def test_the_data():
    faults = known_faults()
    assert all(re.fullmatch(r"https://github\.com/[\w-]+/\w+/issues/\d+", fault.source) for fault in faults)
    # As issue 205 counts them: 76 branches of one file, and 10 of another, of which step 143000 is right.
    pythia = [fault.steps for fault in faults if fault.repository == "EleutherAI/pythia-2.8b"]
    assert [len(steps) for steps in pythia] == [76, 9]
    assert not pythia[0] & pythia[1]
    assert 143000 not in pythia[0] | pythia[1]


@pytest.mark.parametrize(
    ("name", "steps", "told"),
    [
        ("EleutherAI/pythia-12b@step{step}", (1000, 50000, 58000), [r"steps of EleutherAI/pythia-12b .*: 50000, 58000 \(https"]),
        ("EleutherAI/pythia-12b@step{step}", (1000, 143000), []),
        ("EleutherAI/pythia-2.8b@step{step}", (512, 54000), ["byte for byte.*: 512 ", "step 143000: 54000 "]),
        ("EleutherAI/pythia-2.8b-deduped@step{step}", (512,), []),
        ("/data/pythia-2.8b/step{step}", tuple(range(0, 20000, 1000)), ["0, 1000, .*, 7000 and 12 more"]),
        ("elsewhere/step{step}", (512,), []),
    ],
)
def test_a_schedule_that_uses_one_is_told(name, steps, told):
    lines = known_fault_warnings(name, steps)
    assert len(lines) == len(told)
    for line, expression in zip(lines, told, strict=True):
        assert re.search(expression, line), line
        assert line.startswith("teacher.trajectory: ")
        assert "leave them out of the schedule" in line


def test_the_plan_carries_the_warning():
    spec = "hf:EleutherAI/pythia-12b@step{step}"
    arguments = [f"--teacher.trajectory={spec}", "--teacher.steps=[1000, 50000]", "--schedule.policy=one_shot"]
    config = load(None, ["--task.kind=parity", *arguments])
    (warning,) = resolve_plan(config, HuggingFaceTrajectory(spec, (1000, 50000))).warnings
    assert "50000" in warning
    early = config.schedule.model_copy(update={"checkpoint": 1000})
    assert resolve_plan(config, HuggingFaceTrajectory(spec, (1000, 50000)), early).warnings == ()
