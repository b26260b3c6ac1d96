"""The co-located teacher: what it answers, when it rotates, what it refuses."""

import threading
import time
from concurrent.futures import CancelledError

import pytest
import torch

from megapd.config import load
from megapd.errors import SignalMismatch, UserError
from megapd.schedule.plan import Plan
from megapd.signals import Signal, SignalSpec, negotiate
from megapd.tasks import build_task
from megapd.teacher.engine import Teacher, TeacherOptions
from megapd.teacher.limits import Demands
from megapd.teacher.stream import ColocatedStream
from megapd.training import build_student, checkpoint_config
from megapd.trajectory import CheckpointTimeout, Trajectory
from megapd.trajectory.writer import write_checkpoint
from megapd.world import join_world

STEPS = (10, 20, 30)


def configuration(*overrides):
    model = ["--model.kind=gpt", "--model.layers=1", "--model.hidden=16", "--model.heads=2", "--training.global_batch=6"]
    return load(None, ["--task.kind=parity", "--task.dimension=9", "--task.degree=2", *model, *overrides])


@pytest.fixture(scope="module")
def config():
    return configuration()


@pytest.fixture(scope="module")
def task(config):
    return build_task(config)


@pytest.fixture(scope="module")
def models(task):
    """The teacher's model at each step of its trajectory."""
    return {step: build_student(configuration(f"--seed={step}"), task).requires_grad_(False) for step in STEPS}


@pytest.fixture
def trajectory(tmp_path, config, task, models):
    for step, model in models.items():
        write_checkpoint(
            tmp_path,
            step,
            model.named_parameters(),
            config=checkpoint_config(config, task),
            vocabulary=task.vocabulary_digest,
            metrics={},
            shard_bytes=1 << 20,
        )
    return Trajectory(tmp_path)


def make_teacher(trajectory, task, wait_seconds=None, resident=1):
    options = TeacherOptions(chunk_bytes=64, wait_seconds=wait_seconds, resident=resident)
    return Teacher(trajectory, join_world(), options, Demands(task.vocabulary_digest, length=task.length))


@pytest.fixture
def teacher(trajectory, task):
    teacher = make_teacher(trajectory, task)
    yield teacher
    teacher.close()


PLAN = Plan("explicit", 9, tuple(zip((0, 4, 6), STEPS, strict=True)))


@pytest.mark.parametrize("kind", ["dense", "hidden", "argmax"])
def test_every_step_has_the_signal_of_the_teacher_that_the_plan_names(teacher, trajectory, task, models, kind):
    stream = ColocatedStream(teacher, PLAN, SignalSpec(kind))
    for step in range(PLAN.steps):
        batches = [task.batch(step, range(0, 4)), task.batch(step, range(4, 6))]
        signals = list(stream.signals(step, batches))
        named = PLAN.checkpoint_at(step)
        for batch, signal in zip(batches, signals, strict=True):
            logits = models[named](batch, mode="logits")
            assert signal.teacher == trajectory.checkpoint(named).digest
            assert signal.samples == batch.digest
            if kind == "dense":
                assert torch.equal(signal.values, logits)
            elif kind == "argmax":
                assert torch.equal(signal.values, logits.argmax(-1))
            else:
                assert torch.allclose(signal.values @ signal.head.weight.T, logits, atol=1e-6)


def test_exact_kinds_give_one_loss(teacher, task):
    student = build_student(configuration("--seed=5", "--loss.teacher_temperature=0"), task)
    batch = task.batch(0, range(6))
    teacher.rotate(10)
    losses = [student(batch, teacher.signal(batch, SignalSpec(kind)), 6)[0].item() for kind in ("dense", "hidden", "argmax")]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert losses[0] > 0.1


def test_the_next_checkpoint_is_read_before_it_is_needed(teacher, trajectory, task):
    loaded, load = [], trajectory.read
    done = {step: threading.Event() for step in STEPS}

    def recording(step, wanted):
        tensors = load(step, wanted)
        loaded.append((step, threading.current_thread().name))
        done[step].set()
        return tensors

    trajectory.read = recording
    stream = ColocatedStream(teacher, PLAN, SignalSpec("dense"))
    stream.teacher(0)
    stream.teacher(0)
    assert [step for step, _ in loaded] == [10], "nothing is read beside the step that rotates"
    stream.teacher(1)
    assert done[20].wait(10)  # three steps before the rotation
    assert [step for step, _ in loaded] == [10, 20]
    assert all(thread.startswith("teacher-reader") for _, thread in loaded)
    stream.teacher(4)
    stream.teacher(5)
    assert done[30].wait(10)
    assert [step for step, _ in loaded] == [10, 20, 30]


def test_a_wrong_signal_is_refused(teacher, task):
    batch, other = task.batch(0, range(6)), task.batch(1, range(6))
    held = teacher.rotate(10)
    signal = teacher.signal(batch, SignalSpec("dense"))
    signal.check(held.digest, batch)
    with pytest.raises(SignalMismatch, match=held.digest):
        signal.check("another", batch)
    with pytest.raises(SignalMismatch, match=other.digest):
        signal.check(held.digest, other)
    with pytest.raises(SignalMismatch, match="3 positions"):
        Signal(SignalSpec("dense"), held.digest, batch.digest, signal.values[:3]).check(held.digest, batch)


def test_the_wait_for_a_checkpoint_counts_from_when_it_is_needed(trajectory, task):
    """Not from when it was prepared: a teacher's refresh may be longer than the time-out."""
    hidden = trajectory.folder / "step_20"
    aside = hidden.rename(trajectory.folder / "aside")
    teacher = make_teacher(trajectory, task, wait_seconds=0.3)
    teacher.prepare(20)
    time.sleep(0.6)
    assert not teacher.ready(20)
    aside.rename(hidden)
    assert teacher.rotate(20).step == 20
    teacher.close()


def test_a_wait_that_is_given_up_ends_at_once(trajectory, task):
    teacher = make_teacher(trajectory, task, wait_seconds=60.0)
    teacher.prepare(25)
    waiting = teacher._staging._ahead[25]
    teacher.close()
    with pytest.raises(CancelledError):
        waiting.result(timeout=5)


def test_a_checkpoint_that_does_not_come_in_time(trajectory, task):
    teacher = make_teacher(trajectory, task, wait_seconds=0.2)
    with pytest.raises(CheckpointTimeout, match="step 25"):
        teacher.rotate(25)
    teacher.close()


def test_another_vocabulary_is_refused(trajectory, task):
    other = build_task(configuration("--task.seed=1"))
    teacher = make_teacher(trajectory, other)
    with pytest.raises(UserError, match=r"teacher\.trajectory"):
        teacher.rotate(10)


def test_a_checkpoint_of_another_architecture_is_refused(teacher, trajectory, config, task, models):
    teacher.rotate(10)
    wider = build_student(configuration("--model.layers=2"), task)
    write_checkpoint(
        trajectory.folder,
        20,
        wider.named_parameters(),
        config={**config.model_dump(mode="json"), "shapes": {}},
        vocabulary=task.vocabulary_digest,
        metrics={},
        shard_bytes=1 << 20,
    )
    with pytest.raises(UserError, match="step_20"):
        teacher.rotate(20)


def test_negotiation_takes_the_cheapest_exact_kind():
    assert negotiate(30000, 768, 0.0, "forward_kl") == "argmax"
    assert negotiate(30000, 768, 1.0, "forward_kl") == "hidden"
    assert negotiate(2, 768, 1.0, "forward_kl") == "dense"
    assert negotiate(30000, 768, 0.0, "jsd") == "hidden"
