"""The chunked losses where arithmetic is hard: nothing counted, NaN and -inf, ties, near-equal and saturated distributions."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from megapd_kernels import LossOptions, distillation_loss, linear_distillation_loss, softmax_kl

from .cases import (
    DIVERGENCES,
    F64,
    FORMS,
    N,
    V,
    make_case,
    possible,
    relative,
    row_bytes,
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [0, N])
def test_nothing_counted_gives_zero_and_zero_gradients(form: str, n: int) -> None:
    case = make_case(n, ignored=n)
    result = case.loss(form, LossOptions(alpha=0.5), labels=case.labels)
    result.loss.backward()
    assert [x.item() for x in result[:4]] == [0, 0, 0, 0]
    for leaf in case.student:
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["label", "weight"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_positions_that_do_not_count_may_hold_anything(form: str, how: str, divergence: str) -> None:
    if not possible(divergence, form):
        return
    case = make_case(ignored=0)
    teacher = {name: t for name, t in case.teacher(form).items() if t is not None}
    options = LossOptions(divergence, alpha=0.5, chunk_bytes=3 * row_bytes(V))
    keep = torch.arange(N) % 3 > 0
    per_token = {name: t[keep] if t.shape[0] == N else t for name, t in teacher.items()}
    expected = linear_distillation_loss(
        case.hidden[keep], case.weight, bias=case.bias, labels=case.labels[keep], **per_token, options=options
    )
    wanted = torch.autograd.grad(expected.loss, case.student)

    dirty = case.hidden.detach().masked_fill(~keep[:, None], math.nan).requires_grad_()
    for tensor in teacher.values():
        if tensor.shape[0] == N:
            tensor[~keep] = math.nan if tensor.is_floating_point() else -1
    targets: dict[str, Any] = {"labels": case.labels.masked_fill(~keep, -100)}
    if how == "weight":
        targets = {"labels": case.labels.masked_fill(~keep, 10**6), "token_weights": keep.double()}
    result = linear_distillation_loss(dirty, case.weight, bias=case.bias, **targets, **teacher, options=options)
    gradients = torch.autograd.grad(result.loss, (dirty, case.weight, case.bias))
    for value, reference in zip((*result[:4], *gradients), (*expected[:4], *wanted), strict=True):
        assert relative(value, reference) < 1e-12
    assert torch.equal(gradients[0][~keep], torch.zeros_like(gradients[0][~keep]))


def test_positions_that_do_not_count_may_be_infinite() -> None:
    """The class banned here is the one that masked labels and ids are replaced by."""
    case = make_case(ignored=0)
    assert case.bias is not None
    with torch.no_grad():
        case.bias[0] = -math.inf
    labels = torch.arange(N) + 1
    labels[::2] = -100
    for form in ("none", "ids"):
        teacher = {} if form == "none" else {"teacher_ids": torch.arange(N) + 2}
        result = case.linear(labels=labels, **teacher, options=LossOptions(alpha=0.5))
        student = F.linear(case.hidden, case.weight, case.bias)
        wanted = distillation_loss(student, labels=labels, **teacher, options=LossOptions(alpha=0.5))
        assert wanted.loss.isfinite()
        torch.testing.assert_close(tuple(result), tuple(wanted))
        for value, expected in zip(
            torch.autograd.grad(result.loss, case.student), torch.autograd.grad(wanted.loss, case.student), strict=True
        ):
            assert relative(value, expected) < 1e-11


def test_a_nan_that_counts_is_not_hidden() -> None:
    for divergence, form in itertools.product(DIVERGENCES, FORMS):
        if not possible(divergence, form):
            continue
        case = make_case(ignored=0)
        with torch.no_grad():
            case.hidden[3, 2] = math.nan
        result = case.loss(form, LossOptions(divergence, alpha=0.5), labels=case.labels)
        result.loss.backward()
        assert result.loss.isnan(), (divergence, form)
        assert case.weight.grad is not None
        assert case.weight.grad.isnan().any(), (divergence, form)
    teacher = torch.zeros(2, 4).index_fill(1, torch.tensor([1]), math.nan)
    for divergence in DIVERGENCES:
        leaf = torch.zeros(2, 4, requires_grad=True)
        loss = softmax_kl(leaf, teacher, options=LossOptions(divergence)).loss
        assert loss.isnan(), divergence
        assert torch.autograd.grad(loss, leaf)[0].isnan().all(), divergence


def test_an_out_of_range_label_is_an_error() -> None:
    case = make_case()
    with pytest.raises(RuntimeError, match=r"out of bounds"):
        case.loss("none", LossOptions(), labels=torch.full((N,), V))


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "reverse_kl"])
def test_temperature_zero_is_the_limit_and_ties_take_the_lowest_index(divergence: str) -> None:
    case = make_case().to(torch.float32)
    zero = LossOptions(divergence, teacher_temperature=0.0)
    for form in ("logits", "hidden"):
        tiny = dataclasses.replace(zero, teacher_temperature=1e-20)
        one_hot, nearly = case.loss(form, zero).loss, case.loss(form, tiny).loss
        torch.testing.assert_close(one_hot, nearly, rtol=1e-5, atol=0)
        for a, b in zip(torch.autograd.grad(one_hot, case.student), torch.autograd.grad(nearly, case.student), strict=True):
            assert relative(a, b) < 1e-5
    half = (100 * torch.randn(3, 9)).half()
    torch.testing.assert_close(
        softmax_kl(half, half.flip(1), options=dataclasses.replace(zero, teacher_temperature=1e-20)).loss,
        softmax_kl(half, teacher_ids=half.flip(1).argmax(1), options=zero).loss,
        rtol=1e-5,
        atol=1e-6,
    )
    tied = torch.tensor([[1.0, 4.0, 4.0]])
    student = torch.tensor([[0.0, 1.0, 2.0]])
    assert softmax_kl(student, tied, options=zero).loss == softmax_kl(student, teacher_ids=torch.tensor([1]), options=zero).loss


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("banned", ["both", "student", "teacher"])
def test_banned_classes(divergence: str, dtype: torch.dtype, banned: str) -> None:
    """-inf through the biases; where the value is finite, so are the gradients, and both equal the reference's."""
    case = make_case()
    assert case.bias is not None
    assert case.teacher_bias is not None
    with torch.no_grad():
        if banned != "teacher":
            case.bias[[0, 7]] = -math.inf
        if banned != "student":
            case.teacher_bias[[0, 7]] = -math.inf
    case = case.to(dtype)
    options = LossOptions(divergence, teacher_temperature=0.7, student_temperature=1.5, chunk_bytes=3 * row_bytes(V))
    if (banned == "student" and divergence in ("forward_kl", "soft_cross_entropy")) or (
        banned == "teacher" and divergence == "reverse_kl"
    ):
        for form in ("logits", "hidden"):
            assert case.loss(form, options).loss == math.inf
        return
    for form in ("logits", "hidden"):
        result, wanted = case.loss(form, options), case.reference(form, options)
        assert relative(result.loss, wanted.loss) < 1e-5
        for value, expected in zip(
            torch.autograd.grad(result.loss, case.student), torch.autograd.grad(wanted.loss, case.student), strict=True
        ):
            assert expected.isfinite().all()
            assert relative(value, expected) < 1e-5


def test_an_infinite_divergence_of_share_zero_does_not_reach_the_loss() -> None:
    student, teacher = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True), torch.zeros(1, 3)
    labels = torch.tensor([2])
    for divergence in ("forward_kl", "reverse_kl", "soft_cross_entropy"):
        pair = (teacher, student.detach()) if divergence == "reverse_kl" else (student, teacher)
        leaf = pair[0].clone().detach().requires_grad_()
        result = softmax_kl(leaf, pair[1], labels=labels, options=LossOptions(divergence, alpha=1.0))
        assert result.divergence == math.inf
        torch.testing.assert_close(result.loss, F.cross_entropy(leaf, labels))
        (gradient,) = torch.autograd.grad(result.loss, leaf)
        torch.testing.assert_close(gradient, torch.autograd.grad(F.cross_entropy(leaf, labels), leaf)[0])


@pytest.mark.parametrize("gap", [1e-2, 1e-3, 0.0])
def test_a_student_near_its_teacher(gap: float) -> None:
    """Float32 keeps the sign of every divergence, and the JSD and its gradient to digits, where a difference of logs has none."""
    torch.manual_seed(0)
    teacher = 3 * torch.randn(16, 4096)
    student = (teacher + gap * torch.randn(16, 4096)).requires_grad_()
    for divergence in ("forward_kl", "reverse_kl", "jsd", "tvd"):
        for row in range(16):
            options = LossOptions(divergence)
            assert softmax_kl(student[row : row + 1].detach(), teacher[row : row + 1], options=options).divergence >= 0
    if gap:
        result = softmax_kl(student, teacher, options=LossOptions("jsd"))
        wanted = distillation_loss(student.double(), teacher_logits=teacher.double(), options=LossOptions("jsd"))
        (value,), (expected,) = torch.autograd.grad(result.loss, student), torch.autograd.grad(wanted.loss, student)
        assert relative(result.loss, wanted.loss) < 1e-6 / gap
        assert relative(value, expected) < 1e-6 / gap


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_saturated_rows(divergence: str, dtype: torch.dtype) -> None:
    """Probabilities that underflow on either or both sides, and logits of 1e4."""
    torch.manual_seed(0)
    teacher = 200 * torch.randn(8, 33, dtype=dtype)
    teacher[0], teacher[1, 3] = 0.0, 1e4
    student = (200 * torch.randn(8, 33, dtype=dtype)).requires_grad_()
    with torch.no_grad():
        student[0, 5], student[1, 4], student[2] = 1e4, 1e4, teacher[2]
    for beta in (0.5, 1e-8, 1 - 1e-8) if divergence == "jsd" else (0.5,):
        options = LossOptions(divergence, beta=beta)
        result = softmax_kl(student, teacher, options=options)
        wanted = distillation_loss(student.double(), teacher_logits=teacher.double(), options=options)
        (value,), (expected,) = torch.autograd.grad(result.loss, student), torch.autograd.grad(wanted.loss, student)
        assert value.isfinite().all()
        assert relative(result.loss, wanted.loss) < (1e-5 if dtype == torch.float32 else 1e-8)
        # Log ratios of the size of the loss cancel, and some gradients vanish with p: absolute digits are left.
        assert (value - expected).norm() <= 10 * torch.finfo(dtype).eps * max(1.0, wanted.loss.item())
        if divergence in ("forward_kl", "soft_cross_entropy"):
            assert expected.norm() > 0.1


@pytest.mark.parametrize("beta", [1e-8, 0.5, 1 - 1e-6])
def test_jsd_of_ids_with_extreme_students(beta: float) -> None:
    student = torch.tensor([[0.0, 0.0, 0.0], [200.0, 0.0, 0.0], [0.0, 200.0, 0.0], [0.0, -math.inf, 0.0]])
    ids, options = torch.tensor([1, 1, 1, 1]), LossOptions("jsd", beta=beta)
    for row in range(4):
        leaf = student[row : row + 1].clone().requires_grad_()
        result = softmax_kl(leaf, teacher_ids=ids[row : row + 1], options=options)
        wanted = distillation_loss(leaf.double(), teacher_ids=ids[row : row + 1], options=options)
        (value,), (expected,) = torch.autograd.grad(result.loss, leaf), torch.autograd.grad(wanted.loss, leaf)
        assert result.divergence >= 0
        torch.testing.assert_close(result.loss.double(), wanted.loss, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
