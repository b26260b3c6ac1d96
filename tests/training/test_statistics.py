"""telemetry.statistics: what each line says of student and teacher at temperature 1, without a change to what is learnt."""

from __future__ import annotations

import pytest
import torch

from megapd.cli import main
from megapd.config import load
from megapd.models import STATISTICS, build_model
from megapd.tasks import build_task
from megapd.trajectory import Trajectory
from megapd_kernels import LossOptions
from tests.corpus import corpora
from tests.training.runs import metrics

pytestmark = pytest.mark.slow

STEPS = 4
# Of each kind of signal: what a run tells, and other settings.
ZERO = "--loss.teacher_temperature=0"
KINDS = {
    "hidden": (STATISTICS, ["--loss.teacher_temperature=0.5", "--loss.divergence=jsd", "--loss.alpha=0.3"]),
    "dense": (STATISTICS, [ZERO]),
    "topk": (("entropy", "agreement"), []),
    "argmax": (("entropy", "agreement"), [ZERO]),
    "sampled": (("entropy",), []),
}


def train(folder, name, *overrides, hidden=16):
    arguments = [
        f"--runs_dir={folder}",
        f"--name={name}",
        f"--task={{kind: text, objective: clm, corpus: {folder}/corpus}}",
        f"--model={{kind: gpt, layers: 1, heads: 2, hidden: {hidden}}}",
        f"--training={{steps: {STEPS}, global_batch: 8, micro_batch: 4}}",
        "--optimizer.lr=0.01",
        "--telemetry={every: 1, wandb: disabled, progress: false, statistics: 100000}",
        "--evaluation={samples: 4, every: 2}",
        "--trajectory.every=1",
        *overrides,
    ]
    assert main(["train", *arguments]) == 0


def taught(folder, name, signal, *overrides):
    teacher = [f"--teacher.trajectory={folder}/teacher/trajectory", f"--teacher.signal={signal}"]
    train(folder, name, *teacher, "--schedule={policy: matched, refresh: 2}", *overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics")
    corpora.prepared(folder, "gpt")
    train(folder, "teacher", "--seed=1", hidden=32)
    for kind, (_, settings) in KINDS.items():
        taught(folder, kind, kind, *settings)
    return folder


def lines(folder, name, kind="train"):
    return [line for line in metrics(folder / name) if line["kind"] == kind]


def logits(folder, run, step, batch):
    config = load(folder / run / "config.yaml")
    task = build_task(config)
    sizes = {"vocab_size": task.vocab_size, "classes": task.classes, "length": task.length}
    learner = build_model(config.model, **sizes, options=LossOptions(), seed=0)
    learner.load_state_dict(Trajectory(folder / run / "trajectory").load(step), strict=False)
    with torch.no_grad():
        return learner(batch, mode="logits").double()


def by_hand(student, teacher, labels):
    """STATISTICS of logits [N, V], the mean over the positions."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    five = [side.topk(5).indices for side in (student, teacher)]
    shared = (five[0][:, :, None] == five[1][:, None, :]).any(1).double().mean()
    found = {
        "kl": (q.exp() * (q - p)).sum(-1).mean(),
        "teacher_cross_entropy": -q.gather(1, labels[:, None]).mean(),
        "entropy": -(p.exp() * p).sum(-1).mean(),
        "teacher_entropy": -(q.exp() * q).sum(-1).mean(),
        "agreement": (student.argmax(-1) == teacher.argmax(-1)).double().mean(),
        "top_agreement": shared,
    }
    return {name: value.item() for name, value in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_both_models(folder, kind):
    """Of the batch of a step, with the student's weights before it and its teacher's, whatever the loss's own temperature."""
    step = 3
    line = lines(folder, kind)[step]
    batch = build_task(load(folder / kind / "config.yaml")).batch(step, range(8))
    wanted = by_hand(logits(folder, kind, step, batch), logits(folder, "teacher", line["teacher_step"], batch), batch.labels)
    told = {name: value for name, value in line.items() if name in STATISTICS}
    told |= {name: value for name, value in lines(folder, kind, "eval")[step // 2].items() if name in STATISTICS}
    assert set(told) == set(KINDS[kind][0])
    for name, value in told.items():
        assert value == pytest.approx(wanted[name], abs=1e-5), name
    assert wanted["kl"] > 1e-3


def test_evaluations_tell_how_many_of_the_likeliest_classes_agree(folder):
    """In their own lines: a line of training is the same wherever evaluations lie."""
    evaluations = lines(folder, "hidden", "eval")
    assert [line["step"] for line in evaluations] == [2, 4]
    assert all(0 < line["top_agreement"] <= 1 for line in evaluations)
    assert not any("top_agreement" in line for line in lines(folder, "hidden") + lines(folder, "argmax", "eval"))


def test_of_some_positions_alone(folder):
    """Evenly spaced over those of each micro-batch; none for 0, and then nothing else changes."""
    taught(folder, "some", "hidden", "--telemetry.statistics=10")
    taught(folder, "none", "hidden", "--telemetry.statistics=0")
    task, step = build_task(load(folder / "some" / "config.yaml")), 3
    line = lines(folder, "some")[step]
    sides = [[], [], []]
    for rows in (range(4), range(4, 8)):
        batch = task.batch(step, rows)
        kept = [place * batch.labelled // 5 for place in range(5)]
        sides[0].append(logits(folder, "some", step, batch)[kept])
        sides[1].append(logits(folder, "teacher", line["teacher_step"], batch)[kept])
        sides[2].append(batch.labels[kept])
    line |= {"top_agreement": lines(folder, "some", "eval")[-1]["top_agreement"]}
    for name, value in by_hand(*map(torch.cat, sides)).items():
        assert line[name] == pytest.approx(value, abs=1e-5), name
    plain = [{key: value for key, value in line.items() if key not in STATISTICS} for line in metrics(folder / "some")]
    assert plain == metrics(folder / "none")


def test_a_run_without_a_teacher_tells_its_own_entropy(folder):
    assert {name for name in lines(folder, "teacher")[0] if name in STATISTICS} == {"entropy"}
