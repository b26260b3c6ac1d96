"""The chunked losses against the float64 reference: values, gradients, memory."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megapd.kernels import LossOptions, distillation_loss, linear_cross_entropy, linear_distillation_loss, softmax_kl

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "tvd", "soft_cross_entropy"]
FORMS = ["hidden", "logits", "ids", "none"]
UPSTREAM = -1.7  # not 1: what multiplies the loss must reach every gradient


class Problem:
    """Random inputs of one loss; `spread` scales the logits, `closeness` moves the teacher towards the student."""

    def __init__(self, n=7, v=13, ds=5, dt=3, seed=0, spread=1.0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = (spread * normal(n, ds)).to(dtype).requires_grad_()
        self.weight = normal(v, ds).to(dtype).requires_grad_()
        self.bias = normal(v).to(dtype).requires_grad_()
        self.teacher_hidden, self.teacher_weight = (spread * normal(n, dt)).to(dtype), normal(v, dt).to(dtype)
        self.teacher_bias = normal(v).to(dtype)
        self.labels = torch.randint(v, (n,), generator=generator)
        self.weights = torch.rand(n, generator=generator, dtype=torch.float64).to(dtype)
        self.leaves = (self.hidden, self.weight, self.bias)

    def teacher_logits(self) -> Tensor:
        return F.linear(self.teacher_hidden, self.teacher_weight, self.teacher_bias)

    def teacher(self, form: str) -> dict:
        if form == "hidden":
            names = ("teacher_hidden", "teacher_weight", "teacher_bias")
            return {name: getattr(self, name) for name in names}
        if form == "logits":
            return {"teacher_logits": self.teacher_logits()}
        return {"teacher_ids": self.teacher_logits().argmax(-1)} if form == "ids" else {}

    def chunked(self, form: str, options: LossOptions, **arguments):
        return linear_distillation_loss(*self.leaves, **self.teacher(form), options=options, **arguments)

    def reference(self, form: str, options: LossOptions, **arguments):
        student = F.linear(self.hidden.double(), self.weight.double(), self.bias.double())
        teacher = self.teacher(form)
        if form in ("hidden", "logits"):
            logits = F.linear(self.teacher_hidden.double(), self.teacher_weight.double(), self.teacher_bias.double())
            teacher = {"teacher_logits": logits}
        return distillation_loss(student, **teacher, options=options, **arguments)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(UPSTREAM * loss, self.leaves))


def error(ours: Tensor, wanted: Tensor) -> float:
    return ((ours.double() - wanted.double()).norm() / wanted.double().norm()).item()


def combinations():
    for divergence, form in itertools.product(DIVERGENCES, FORMS):
        if divergence == "reverse_kl" and form == "ids":
            continue
        for teacher_temperature, alpha in [(1.0, 0.0), (0.5, 0.3), (0.0, 0.25)]:
            if divergence == "reverse_kl" and teacher_temperature == 0.0:
                continue
            yield divergence, form, teacher_temperature, alpha


@pytest.mark.parametrize(("divergence", "form", "teacher_temperature", "alpha"), combinations())
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_reference(divergence, form, teacher_temperature, alpha, masked):
    problem = Problem()
    labels, weights, denominator = problem.labels.clone(), None, None
    if masked:
        labels[[0, 3]], weights, denominator = -100, problem.weights, 2.5
    arguments = {"labels": labels, "token_weights": weights, "denominator": denominator}
    reference = LossOptions(divergence, teacher_temperature, student_temperature=1.5, alpha=alpha, beta=0.3, scale_t2=True)
    wanted = problem.reference(form, reference, **arguments)
    wanted_gradients = problem.gradients(wanted.loss)
    assert all(gradient.norm() > 1e-4 for gradient in wanted_gradients)
    for chunk_bytes in (1, 500, 1 << 20):  # a row, a few rows, all of them
        options = LossOptions(divergence, teacher_temperature, 1.5, alpha, 0.3, True, chunk_bytes)
        ours = problem.chunked(form, options, **arguments)
        for a, b in zip(ours, wanted, strict=True):
            assert a.item() == pytest.approx(b.item(), rel=1e-9, abs=1e-12)
        for a, b in zip(problem.gradients(ours.loss), wanted_gradients, strict=True):
            assert error(a, b) < 1e-9


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("form", ["hidden", "logits"])
def test_gradcheck(divergence, form):
    problem = Problem(n=3, v=5, ds=2, dt=2)
    options = LossOptions(divergence, 0.7, 1.3, alpha=0.2, beta=0.4, scale_t2=True, chunk_bytes=100)

    def loss(hidden, weight, bias):
        teacher = problem.teacher(form)
        return linear_distillation_loss(hidden, weight, bias, labels=problem.labels, **teacher, options=options).loss

    assert torch.autograd.gradcheck(loss, problem.leaves)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_in_equals_hidden_in(divergence):
    problem, options = Problem(), LossOptions(divergence, 0.7, alpha=0.1, chunk_bytes=300)
    student = F.linear(*problem.leaves)
    ours = softmax_kl(student, problem.teacher_logits(), labels=problem.labels, options=options)
    wanted = problem.chunked("hidden", options, labels=problem.labels)
    assert ours.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-10)
    for a, b in zip(problem.gradients(ours.loss), problem.gradients(wanted.loss), strict=True):
        assert error(a, b) < 1e-9


def test_cross_entropy_is_torch_s():
    problem = Problem()
    problem.labels[2] = -100
    ours = linear_cross_entropy(*problem.leaves, problem.labels, options=LossOptions(chunk_bytes=200))
    wanted = F.cross_entropy(F.linear(*problem.leaves), problem.labels)
    assert ours.loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    for a, b in zip(problem.gradients(ours.loss), problem.gradients(wanted), strict=True):
        assert error(a, b) < 1e-10
    predicted = F.linear(*problem.leaves).argmax(-1)
    assert ours.correct.item() == ((predicted == problem.labels) & (problem.labels != -100)).sum().item()


def test_a_second_backward_finds_the_gradients_unchanged():
    problem = Problem()
    loss = problem.chunked("hidden", LossOptions()).loss
    first = torch.autograd.grad(loss, problem.leaves, retain_graph=True)
    second = torch.autograd.grad(3 * loss, problem.leaves)
    for a, b in zip(first, second, strict=True):
        assert error(b, 3 * a) < 1e-14


@pytest.mark.parametrize("form", FORMS)
def test_nothing_counted_is_zero_with_zero_gradients(form):
    problem = Problem()
    masked = torch.full_like(problem.labels, -100)
    result = problem.chunked(form, LossOptions(alpha=0.5), labels=masked)
    assert [value.item() for value in result] == [0.0] * 4
    assert all(torch.equal(g, torch.zeros_like(g)) for g in problem.gradients(result.loss))


@pytest.mark.parametrize("form", FORMS)
def test_no_positions(form):
    problem = Problem(n=0)
    result = problem.chunked(form, LossOptions(), labels=problem.labels)
    assert result.loss.item() == 0.0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in problem.gradients(result.loss))


def test_masked_positions_may_hold_nan():
    problem = Problem()
    problem.labels[1] = -100
    wanted = problem.chunked("hidden", LossOptions(alpha=0.5), labels=problem.labels)
    wanted_gradients = problem.gradients(wanted.loss)
    with torch.no_grad():
        problem.hidden[1] = math.nan
        problem.teacher_hidden[1] = math.nan
    ours = problem.chunked("hidden", LossOptions(alpha=0.5), labels=problem.labels)
    assert ours.loss.item() == wanted.loss.item()
    for a, b in zip(problem.gradients(ours.loss), wanted_gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_banned_tokens_on_both_sides(divergence, dtype):
    problem = Problem(dtype=dtype)
    with torch.no_grad():
        problem.bias[[2, 5]] = -math.inf
        problem.teacher_bias[[2, 5]] = -math.inf
        problem.labels[:] = 0
    ours = problem.chunked("hidden", LossOptions(divergence, alpha=0.2), labels=problem.labels)
    keep = [i for i in range(13) if i not in (2, 5)]
    smaller = [problem.hidden.double(), problem.weight.double()[keep], problem.bias.double()[keep]]
    teacher = F.linear(
        problem.teacher_hidden.double(), problem.teacher_weight.double()[keep], problem.teacher_bias.double()[keep]
    )
    options = LossOptions(divergence, alpha=0.2)
    wanted = distillation_loss(F.linear(*smaller), labels=problem.labels, teacher_logits=teacher, options=options)
    assert ours.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)
    ours_hidden, *others = problem.gradients(ours.loss)
    assert error(ours_hidden, torch.autograd.grad(UPSTREAM * wanted.loss, problem.hidden)[0]) < 1e-5
    assert all(torch.isfinite(gradient).all() for gradient in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jsd_of_a_student_close_to_its_teacher(dtype):
    """Where a difference of logs in 16 bits goes negative and its gradient is a third off."""
    problem = Problem(n=16, v=64, ds=8, dt=8, dtype=dtype)
    with torch.no_grad():
        problem.teacher_hidden.copy_(problem.hidden)
        problem.teacher_weight.copy_(problem.weight)
        problem.teacher_bias.copy_(problem.bias)
        problem.hidden.mul_(1.02)
    ours = problem.chunked("hidden", LossOptions("jsd"))
    wanted = problem.reference("hidden", LossOptions("jsd"))
    assert ours.divergence.item() >= 0.0
    assert ours.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-2)
    for a, b in zip(problem.gradients(ours.loss), problem.gradients(wanted.loss), strict=True):
        assert error(a, b) < (1e-3 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_saturated_rows_stay_finite(divergence):
    problem = Problem(spread=300.0, dtype=torch.float32)
    ours = problem.chunked("hidden", LossOptions(divergence), labels=problem.labels)
    wanted = problem.reference("hidden", LossOptions(divergence), labels=problem.labels)
    assert ours.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-3)
    assert all(torch.isfinite(gradient).all() for gradient in problem.gradients(ours.loss))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_bf16_errs_at_most_twice_as_much_as_torch_in_bf16(divergence):
    problem = Problem(n=32, v=101, ds=16, dt=8, dtype=torch.bfloat16)
    wanted = problem.gradients(problem.reference("hidden", LossOptions(divergence)).loss)
    ours = problem.gradients(problem.chunked("hidden", LossOptions(divergence)).loss)
    student = F.linear(*problem.leaves)
    plain = distillation_loss(student, teacher_logits=problem.teacher_logits(), options=LossOptions(divergence))
    for a, b, c in zip(ours, problem.gradients(plain.loss), wanted, strict=True):
        assert a.dtype == torch.bfloat16
        assert error(a, c) <= 2 * error(b, c)


def test_non_contiguous_inputs():
    problem = Problem()
    wide = torch.randn(14, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    hidden = wide[::2, ::2].detach().requires_grad_()
    weight = problem.weight.detach().t().contiguous().t().requires_grad_()
    teacher = problem.teacher_logits().t().contiguous().t()
    ours = linear_distillation_loss(hidden, weight, teacher_logits=teacher, options=LossOptions(chunk_bytes=300)).loss
    wanted = distillation_loss(hidden @ weight.t(), teacher_logits=teacher).loss
    assert not hidden.is_contiguous()
    for a, b in zip(torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(wanted, (hidden, weight)), strict=True):
        assert error(a, b) < 1e-10


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("form", ["hidden", "ids", "none"])
def test_nothing_of_positions_by_vocabulary_is_ever_made(form):
    n, v, d = 512, 384, 4
    problem = Problem(n=n, v=v, ds=d, dt=d, dtype=torch.float32)
    teacher = problem.teacher(form)
    options = LossOptions(chunk_bytes=32 * v * 4)
    with LargestTensor() as largest:
        loss = linear_distillation_loss(*problem.leaves, labels=problem.labels, **teacher, options=options).loss
        problem.gradients(loss)
    assert largest.elements <= 32 * v
    with LargestTensor() as largest:
        problem.gradients(F.cross_entropy(F.linear(*problem.leaves), problem.labels))
    assert largest.elements >= n * v  # the measure sees plain torch's logits


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"teacher_logits": torch.zeros(7, 12)}, "teacher_logits"),
        ({"teacher_hidden": torch.zeros(7, 3)}, "teacher_weight"),
        ({}, "labels"),
        ({"teacher_ids": torch.zeros(7, dtype=torch.int64), "options": LossOptions("reverse_kl")}, "reverse_kl"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, "labels"),
        ({"labels": torch.zeros(7)}, "labels"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        linear_distillation_loss(*Problem(dtype=torch.float32).leaves, **arguments)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    v=st.integers(1, 17),
    ds=st.integers(1, 4),
    divergence=st.sampled_from(DIVERGENCES),
    form=st.sampled_from(FORMS),
    teacher_temperature=st.sampled_from([0.0, 1e-20, 0.3, 1.0, 4.0]),
    alpha=st.sampled_from([0.0, 0.4, 1.0]),
    chunk_bytes=st.integers(1, 2000),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 1 << 20),
)
def test_drawn_shapes_and_options(n, v, ds, divergence, form, teacher_temperature, alpha, chunk_bytes, spread, seed):
    if divergence == "reverse_kl" and (form == "ids" or teacher_temperature < 0.1):
        return
    problem = Problem(n, v, ds, ds, seed, spread)
    options = LossOptions(divergence, teacher_temperature, alpha=alpha, chunk_bytes=chunk_bytes)
    ours = problem.chunked(form, options, labels=problem.labels)
    wanted = problem.reference(form, options, labels=problem.labels)
    for a, b in zip(ours, wanted, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-8, abs=1e-10)
    for a, b in zip(problem.gradients(ours.loss), problem.gradients(wanted.loss), strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)
