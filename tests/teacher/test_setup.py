"""What a configuration asks of its teacher, and what the answers are made of."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megapd.errors import UserError
from megapd.models import canary, checkpoint_shape
from megapd.schedule.plan import Plan
from megapd.signals import Head, SignalSpec, TeacherOutput
from megapd.tasks import build_task
from megapd.teacher.engine import Teacher, TeacherOptions
from megapd.teacher.limits import Demands
from megapd.teacher.setup import describe_signal, signal_spec, teacher_options
from megapd.world import join_world
from tests.teacher.teachers import STEPS, configuration, write_trajectory

TEACHER = ["--teacher.trajectory=x", "--schedule.policy=one_shot"]
PLAN = Plan("one_shot", 100, ((0, 10),))


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory):
    return write_trajectory(tmp_path_factory.mktemp("trajectory"))


def spec(trajectory, *overrides):
    config = configuration("gpt", *TEACHER, *overrides)
    return signal_spec(config, build_task(config), PLAN, trajectory.checkpoint(10))


def test_auto_is_the_cheapest_exact_kind(trajectory):
    assert spec(trajectory) == SignalSpec("dense")  # 8 classes against a width of 16
    assert spec(trajectory, "--loss.teacher_temperature=0") == SignalSpec("argmax", "fp32")
    assert spec(trajectory, "--training.precision=bf16").encoding == "bf16"
    assert spec(trajectory, "--teacher.precision=bf16").encoding == "bf16"
    assert spec(trajectory, "--teacher.encoding=int8").encoding == "fp32", "int8 is for hidden states, which auto did not choose"


def test_approximate_kinds_are_asked_for(trajectory):
    assert spec(trajectory, "--teacher.signal=hidden", "--teacher.encoding=int8") == SignalSpec("hidden", "int8")
    topk = ["--teacher.signal=topk", "--loss.teacher_temperature=2.0"]
    assert spec(trajectory, *topk, "--teacher.k=3") == SignalSpec("topk", "fp32", 3, 2.0)
    assert spec(trajectory, *topk).k == 8, "no more than there are classes"
    assert spec(trajectory, "--teacher.signal=sampled", "--seed=4") == SignalSpec("sampled", "fp32", 12, 1.0, 4)


def test_the_cost_is_told_in_bytes_a_token(trajectory):
    config = configuration("gpt", *TEACHER)
    shape = checkpoint_shape(trajectory.checkpoint(10))
    text = describe_signal(build_task(config), SignalSpec("hidden", "bf16"), shape)
    assert "hidden, encoding bf16: 32 bytes a labelled position" in text
    assert f"{32 / 21:,.4g} a token" in text
    assert "dense would be 16 bytes" in text


def test_a_server_keeps_the_present_checkpoint_beside_the_next():
    config = configuration("gpt", *TEACHER)
    assert teacher_options(config).resident == 1
    assert teacher_options(config, served=True).resident == 2
    assert teacher_options(configuration("gpt", *TEACHER, "--teacher.resident=3"), served=True).resident == 3


def test_an_unknown_vocabulary_needs_trust(trajectory):
    unknown = SimpleNamespace(**{**trajectory.checkpoint(10).__dict__, "vocabulary": ""})
    with pytest.raises(UserError, match=r"teacher\.same_vocabulary"):
        Demands("v").check(unknown)
    Demands("v", same_vocabulary=True).check(unknown)
    with pytest.raises(UserError, match=r"teacher\.trajectory"):
        Demands("v", same_vocabulary=True).check(trajectory.checkpoint(10))
    with pytest.raises(UserError, match="samples have 22 tokens, the teacher has positions for 21"):
        Demands(length=22).check(trajectory.checkpoint(10))


def test_weights_that_are_not_finite_are_told_before_they_teach(tmp_path, caplog):
    trajectory = write_trajectory(tmp_path)
    read = trajectory.read

    def broken(step, wanted):
        tensors = read(step, wanted)
        if step == 20:
            tensors["body.norm.weight"] = torch.full_like(tensors["body.norm.weight"], torch.nan)
        return tensors

    trajectory.read = broken
    teacher = Teacher(trajectory, join_world(), TeacherOptions())
    teacher.rotate(10)
    for take in (lambda: teacher.prepare(20).result(30), lambda: teacher.rotate(20)):
        with pytest.raises(UserError, match=r"step_20: step 20: body\.norm\.weight holds NaN or an infinity; schedule another"):
            take()
    assert caplog.text.count("step 20, which is to teach later") == 1
    assert teacher.held.step == 10
    trajectory.read = read  # mended, it is taken
    assert teacher.rotate(20).step == 20
    teacher.close()


def test_no_more_checkpoints_are_staged_than_are_needed(trajectory):
    teacher = Teacher(trajectory, join_world(), TeacherOptions())
    teacher.rotate(10)
    waiting = [teacher.prepare(step) for step in range(100, 120)]
    assert len(teacher._staging._ahead) <= 5
    teacher.close()
    assert all(future.done() or future.cancel() or future.exception(10) for future in waiting)


def test_draws_follow_the_distribution_and_the_sample(trajectory):
    """Unbiased: the share of each class among many draws is its probability. And whatever batch a sample is in."""
    task = build_task(configuration("gpt"))
    batch = task.batch(0, range(6))
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(6, 5, generator=generator), Head(torch.randn(8, 5, generator=generator), torch.randn(8))
    asked = SignalSpec("sampled", k=40_000, temperature=1.5, seed=1)
    ids = asked.answer(batch, TeacherOutput(hidden, head, chunk_bytes=200)).values
    shares = torch.stack([row.bincount(minlength=8) for row in ids]) / asked.k
    probabilities = torch.softmax((hidden @ head.weight.T + head.bias) / 1.5, -1)
    assert (shares - probabilities).abs().max() < 5 * 0.5 / np.sqrt(asked.k)
    part = asked.answer(batch.select(slice(2, 5)), TeacherOutput(hidden[2:5], head)).values
    assert torch.equal(part, ids[2:5])
    other = SignalSpec("sampled", k=40_000, temperature=1.5, seed=2).answer(batch, TeacherOutput(hidden, head)).values
    assert not torch.equal(other, ids)


@pytest.mark.parametrize("model", ["gpt", "bert", "mlp"])
def test_the_canary_fits_the_model(tmp_path, model):
    trajectory = write_trajectory(tmp_path, model, steps=STEPS[:1])
    teacher = Teacher(trajectory, join_world(), TeacherOptions())
    teacher.rotate(STEPS[0])
    batch = canary(trajectory.checkpoint(STEPS[0]))
    assert teacher.signal(batch, SignalSpec("dense")).values.shape == (batch.labelled, 8)
    teacher.close()
