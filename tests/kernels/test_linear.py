"""The chunked losses against the float64 reference: values, gradients, refusals."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from megapd_kernels import (
    LossOptions,
    distillation_loss,
    implementation,
    linear_cross_entropy,
    linear_softmax_kl,
    ops,
    softmax_kl,
)
from megapd_kernels.linear import linear_loss

from .cases import (
    DIVERGENCES,
    F64,
    FORMS,
    Case,
    N,
    Recorder,
    V,
    assert_equal_losses,
    below,
    make_case,
    possible,
    relative,
    row_bytes,
)

GRID = [
    (divergence, form, teacher_temperature)
    for divergence, form, teacher_temperature in itertools.product(DIVERGENCES, FORMS, (0.0, 0.5, 1.0))
    if possible(divergence, form, teacher_temperature)
]


@pytest.mark.parametrize(("divergence", "form", "teacher_temperature"), GRID)
def test_equals_the_reference(divergence: str, form: str, teacher_temperature: float) -> None:
    case = make_case()
    for student_temperature, alpha, masked in itertools.product((1.0, 2.0), (0.0, 0.3, 1.0), (False, True)):
        options = LossOptions(
            divergence, teacher_temperature, student_temperature, alpha, beta=0.3, scale_t2=True, chunk_bytes=4 * row_bytes(V)
        )
        targets: dict[str, Any] = {"labels": case.labels if masked else case.labels.clamp(min=0)}
        if masked:
            targets["token_weights"] = case.token_weights
        assert_equal_losses(case, form, options, -3.0, 1e-11, **targets)


@pytest.mark.parametrize("rows", [1, 2, 5, 12, 13, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_the_chunk_size_changes_nothing(rows: int, form: str) -> None:
    case = make_case(bias=rows % 2 == 0)
    options = LossOptions("jsd", student_temperature=2.0, alpha=0.4, chunk_bytes=rows * row_bytes(V))
    assert_equal_losses(case, form, options, 0.25, 1e-11, labels=case.labels, token_weights=case.token_weights)


def test_fewer_bytes_than_a_row_still_compute_one() -> None:
    case = make_case()
    assert_equal_losses(case, "hidden", LossOptions(chunk_bytes=1), 1.0, 1e-11)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_shape_and_options(data: st.DataObject) -> None:
    def draw(strategy: st.SearchStrategy[Any]) -> Any:
        return data.draw(strategy)

    n, v, d, e = (draw(st.integers(1, high)) for high in (9, 20, 6, 6))
    divergence, form = draw(st.sampled_from(DIVERGENCES)), draw(st.sampled_from(FORMS))
    if not possible(divergence, form):
        form = "hidden"
    options = LossOptions(
        divergence,
        teacher_temperature=draw(st.floats(0.2, 4.0)),
        student_temperature=draw(st.sampled_from([1.0, 0.7, 3.0])),
        alpha=draw(st.sampled_from([0.0, 0.25, 1.0])),
        beta=draw(st.floats(0.05, 0.95)),
        scale_t2=draw(st.booleans()),
        chunk_bytes=draw(st.integers(1, 4000)),
    )
    case = make_case(n, v, d, e, seed=draw(st.integers(0, 9)), bias=draw(st.booleans()), ignored=draw(st.integers(0, n)))
    targets: dict[str, Any] = {"labels": case.labels}
    if draw(st.booleans()):
        targets["token_weights"] = case.token_weights
    if draw(st.booleans()):
        targets["denominator"] = 7.0
    result, wanted = case.loss(form, options, **targets), case.reference(form, options, **targets)
    # One class, or nothing counted: the exact answer is 0, which a relative bound does not fit.
    torch.testing.assert_close(tuple(result), tuple(wanted), rtol=1e-9, atol=1e-13)
    for value, expected in zip(
        torch.autograd.grad(result.loss, case.student), torch.autograd.grad(wanted.loss, case.student), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(divergence: str, form: str) -> None:
    """Numeric derivatives know nothing of the reference: T^2, alpha and the denominator are in both or neither."""
    if not possible(divergence, form):
        return
    case = make_case(4, 5, 3, 2, ignored=1)
    options = LossOptions(divergence, 0.8, 2.0, 0.3, beta=0.3, scale_t2=True, chunk_bytes=2 * row_bytes(5))

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        moved = dataclasses.replace(case, hidden=hidden, weight=weight, bias=bias)
        return moved.loss(form, options, labels=case.labels, token_weights=case.token_weights).loss

    assert torch.autograd.gradcheck(loss, case.student, fast_mode=False)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("form", ["none", "ids", "logits"])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_softmax_kl_equals_the_reference(divergence: str, form: str, dtype: torch.dtype) -> None:
    if not possible(divergence, form):
        return
    case = make_case()
    student = F.linear(case.hidden, case.weight, case.bias).detach().to(dtype).requires_grad_()
    targets = {"labels": case.labels, "token_weights": case.token_weights.to(dtype)}
    teacher = case.to(dtype).teacher(form)
    options = LossOptions(divergence, 0.5, 2.0, 0.3, scale_t2=True, chunk_bytes=3 * row_bytes(V))
    result = softmax_kl(student, **targets, **teacher, options=options)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in {**targets, **teacher}.items()}
    wanted = distillation_loss(student.double(), **wide, options=options)
    bound = 1e-11 if dtype == F64 else 2e-6
    assert relative(result.loss, wanted.loss) < bound
    (gradient,), (expected,) = torch.autograd.grad(result.loss * 5, student), torch.autograd.grad(wanted.loss * 5, student)
    assert gradient.dtype == dtype
    assert relative(gradient, expected) < bound


def test_the_thin_wrappers() -> None:
    case = make_case()
    options = LossOptions("jsd", alpha=0.5)
    targets: dict[str, Any] = {"token_weights": case.token_weights, "denominator": 3.0, "ignore_index": 5, "options": options}
    labels = case.labels.clamp(min=5)
    head = {"bias": case.bias, "teacher_bias": case.teacher_bias}
    wrapped = linear_softmax_kl(
        case.hidden, case.weight, case.teacher_hidden, case.teacher_weight, **head, labels=labels, **targets
    )
    assert wrapped == case.loss("hidden", labels=labels, **targets)
    wrapped = linear_cross_entropy(case.hidden, case.weight, labels, bias=case.bias, **targets)
    assert wrapped == case.loss("none", labels=labels, **targets)
    assert implementation(case.hidden.device, F64) == "torch"


# ------------------------------------------------------------------------------------------------------------- autograd


def test_a_second_backward_and_accumulated_micro_batches() -> None:
    case = make_case()
    options = LossOptions(chunk_bytes=3 * row_bytes(V))
    loss = case.loss("hidden", options).loss
    once = torch.autograd.grad(loss, case.student, torch.tensor(2.0, dtype=F64), retain_graph=True)
    twice = torch.autograd.grad(loss, case.student, torch.tensor(6.0, dtype=F64))
    for first, second in zip(once, twice, strict=True):
        assert relative(second, 3 * first) < 1e-14

    whole = torch.autograd.grad(case.loss("hidden", options).loss, case.student)
    for part in torch.arange(N).tensor_split(4):
        micro = dataclasses.replace(case, hidden=case.hidden[part], teacher_hidden=case.teacher_hidden[part])
        micro.loss("hidden", options, denominator=float(N)).loss.backward()
    for leaf, expected in zip(case.student, whole, strict=True):
        assert leaf.grad is not None
        assert relative(leaf.grad, expected) < 1e-12


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=3)))
def test_only_the_needed_gradients_are_made(needed: tuple[bool, ...]) -> None:
    case = make_case(v=101, d=17)  # sizes that no other tensor has
    expected = torch.autograd.grad(case.loss("hidden", LossOptions()).loss, case.student)
    for leaf, wanted in zip(case.student, needed, strict=True):
        leaf.requires_grad_(wanted)
    result = case.loss("hidden", LossOptions())
    arguments = below(lambda: case.loss("hidden", LossOptions()))
    with torch.no_grad(), Recorder() as recorder:
        _, gradients = linear_loss(*arguments, needed)
    assert ((101, 17) in recorder.made) == needed[1]
    assert tuple(g is not None for g in gradients) == needed
    assert result.loss.requires_grad == any(needed)
    assert not any(t.requires_grad for t in result[1:4])
    leaves = [leaf for leaf, wanted in zip(case.student, needed, strict=True) if wanted]
    if leaves:
        for value, wanted in zip(torch.autograd.grad(result.loss, leaves), itertools.compress(expected, needed), strict=True):
            assert relative(value, wanted) < 1e-12


@pytest.mark.parametrize("recompute", [False, True])
def test_without_gradients_none_are_made(recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither without autograd nor, with recompute, in forward."""
    asked: list[tuple[bool, ...]] = []

    def record(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        return linear_loss(*arguments)

    monkeypatch.setattr(ops, "linear_loss", record)
    case, options = make_case(), LossOptions(recompute=recompute)
    with torch.no_grad():
        quiet = case.loss("hidden", options)
    result = case.loss("hidden", options)
    assert relative(quiet.loss, result.loss.detach()) < 1e-12
    assert asked == [(False, False, False), (not recompute,) * 3]


def test_teacher_and_weights_are_constants() -> None:
    case = make_case()
    for tensor in (case.teacher_hidden, case.teacher_weight, case.teacher_bias, case.token_weights):
        tensor.requires_grad_()
    case.loss("hidden", LossOptions(), token_weights=case.token_weights).loss.backward()
    assert case.teacher_weight.grad is None
    assert case.token_weights.grad is None
    assert case.weight.grad is not None


def test_the_weight_may_be_gone_in_backward() -> None:
    """ZeRO-3 frees the gathered weight after forward; its storage is not read again."""
    case = make_case()
    expected = torch.autograd.grad(case.loss("hidden", LossOptions()).loss, case.student)
    loss = case.loss("hidden", LossOptions()).loss
    with torch.no_grad():
        case.weight.fill_(math.nan)
        case.hidden.fill_(math.nan)
    for value, wanted in zip(torch.autograd.grad(loss, case.student), expected, strict=True):
        assert torch.equal(value, wanted)


def test_non_contiguous_inputs() -> None:
    case = make_case()
    strided = Case(
        **{
            field.name: torch.stack([value.detach()] * 2, -1)[..., 1].requires_grad_(value.requires_grad)
            for field in dataclasses.fields(case)
            for value in [getattr(case, field.name)]
        }
    )
    strided.weight = case.weight.detach().t().contiguous().t().requires_grad_()
    assert not any(t.is_contiguous() for t in (strided.hidden, strided.weight, strided.labels, strided.teacher_weight))
    for form in FORMS:
        options = LossOptions("jsd", alpha=0.5, chunk_bytes=3 * row_bytes(V))
        assert_equal_losses(strided, form, options, 2.0, 1e-11, labels=strided.labels, token_weights=strided.token_weights)


def test_autocast_rounds_the_operands_of_the_products_alone() -> None:
    case = make_case().to(torch.float32)
    expected = case.loss("hidden", LossOptions())
    with torch.autocast("cpu", torch.bfloat16):
        full = case.loss("hidden", LossOptions(product_dtype=torch.float32))
        result = case.loss("hidden", LossOptions())
    assert torch.equal(full.loss, expected.loss)
    asked = case.loss("hidden", LossOptions(product_dtype=torch.bfloat16))
    rounded = dataclasses.replace(case.to(torch.bfloat16), bias=case.bias, teacher_bias=case.teacher_bias)
    for each in (result, asked):
        assert each.loss.dtype == torch.float32
        assert torch.equal(each.loss, rounded.loss("hidden", LossOptions()).loss)
        assert not torch.equal(each.loss, expected.loss)
    with torch.autocast("cpu", torch.bfloat16):  # hidden comes out of a 16-bit layer, the weight is still float32
        mixed = dataclasses.replace(case, hidden=case.hidden.detach().bfloat16().requires_grad_())
        mixed.loss("hidden", LossOptions()).loss.backward()
    assert mixed.hidden.grad is not None
    assert mixed.hidden.grad.dtype == torch.bfloat16
    assert mixed.weight.grad is not None
    assert mixed.weight.grad.dtype == torch.float32


def test_arguments_without_a_meaning_are_refused() -> None:
    case = make_case()
    hidden, head = {"teacher_hidden": case.teacher_hidden}, {"teacher_weight": case.teacher_weight}
    logits, ids = case.teacher("logits"), case.teacher("ids")
    cases: list[tuple[str, dict[str, Any]]] = [
        ("^labels: needed where no teacher", {}),
        ("^labels: needed for alpha", {**hidden, **head, "options": LossOptions(alpha=0.1)}),
        ("at most one form", {**logits, **ids}),
        ("at most one form", {**hidden, **head, **ids}),
        ("^teacher_weight: teacher_hidden and", hidden),
        ("^teacher_hidden: teacher_hidden and", {**head, "labels": case.labels}),
        ("^teacher_bias: has no meaning", {**logits, "teacher_bias": case.teacher_bias}),
        ("^teacher_weight: the teacher has 30 classes", {**hidden, "teacher_weight": case.teacher_weight[:30]}),
        ("^teacher_logits: the teacher has 30 classes", {"teacher_logits": logits["teacher_logits"][:, :30]}),
        ("^teacher_hidden: expected shape", {"teacher_hidden": case.teacher_hidden[:3], **head}),
        ("^teacher_bias: expected shape", {**hidden, **head, "teacher_bias": torch.zeros(3)}),
        ("^teacher_ids: reverse_kl", {**ids, "options": LossOptions("reverse_kl")}),
        ("^teacher_ids: expected torch.int64", {"teacher_ids": ids["teacher_ids"].float()}),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=message):
            case.linear(**arguments)
    with pytest.raises(ValueError, match=r"^weight: expected shape"):
        linear_cross_entropy(case.hidden, case.weight[:, :3], case.labels)
    with pytest.raises(ValueError, match=r"^hidden: expected shape"):
        linear_cross_entropy(case.hidden[0], case.weight, case.labels)
    with pytest.raises(ValueError, match=r"^hidden: expected a floating-point"):
        linear_cross_entropy(case.labels[:, None], case.weight[:, :1], case.labels)
    with pytest.raises(ValueError, match=r"^bias: expected shape"):
        linear_cross_entropy(case.hidden, case.weight, case.labels, bias=torch.zeros(3))
