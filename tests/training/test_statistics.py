"""telemetry.statistics: what each step says of both sides' distributions, without a change to what is learnt."""

from __future__ import annotations

import math

import pytest
import torch

from megapd.cli import main
from megapd.config import load
from megapd.models import build_model
from megapd.tasks import build_task
from megapd.training.loop import STATISTICS
from megapd.trajectory import Trajectory
from megapd_kernels import LossOptions
from tests.training import runs

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics")
    trajectory = runs.teacher(folder, 15, 5)
    for name, setting in (("plain", "false"), ("told", "true")):
        more = [
            f"--telemetry.statistics={setting}",
            f"--training.steps={STEPS}",
            "--training.micro_batch=8",
            "--trajectory.every=1",
        ]
        assert main(runs.student(folder, name, trajectory, *more)) == 0
    return folder


def lines(folder, name):
    return [line for line in runs.metrics(folder / name) if line["kind"] == "train"]


def test_nothing_else_changes(folder):
    plain, told = lines(folder, "plain"), lines(folder, "told")
    assert len(told) == STEPS
    assert [{key: value for key, value in line.items() if key not in STATISTICS} for line in told] == plain
    assert all(name in line for line in told for name in STATISTICS)


def test_they_are_those_of_both_models(folder):
    """Of the batch of a step, with the student's weights before it and its teacher's, by hand."""
    config = load(folder / "told" / "config.yaml")
    task, step = build_task(config), 7
    batch = task.batch(step, range(config.training.global_batch))
    line = lines(folder, "told")[step]
    sides = []
    for run, at in ((folder / "told", step), (folder / "teacher", line["teacher_step"])):
        section = load(run / "config.yaml").model
        sizes = {"vocab_size": task.vocab_size, "classes": task.classes, "length": task.length}
        learner = build_model(section, **sizes, options=LossOptions(), seed=0)
        learner.load_state_dict(Trajectory(run / "trajectory").load(at), strict=False)
        with torch.no_grad():
            sides.append(learner(batch, mode="logits").double().log_softmax(-1))
    student, teacher = sides

    def entropy(logprobs):
        return -(logprobs.exp() * logprobs).sum(-1).mean().item()

    assert line["entropy"] == pytest.approx(entropy(student), abs=1e-5)
    assert line["teacher_entropy"] == pytest.approx(entropy(teacher), abs=1e-5)
    assert line["agreement"] == pytest.approx((student.argmax(-1) == teacher.argmax(-1)).double().mean().item())
    assert 0 < line["entropy"] <= math.log(task.classes) + 1e-6
