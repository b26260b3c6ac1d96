"""Terms beside the divergence and ways to compute it: smoothing, z-loss, recomputation, vocabularies of two sizes."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from megapd_kernels import LossOptions, distillation_loss, linear_cross_entropy, linear_distillation_loss, softmax_kl

from .cases import (
    DIVERGENCES,
    F64,
    FORMS,
    SPARSE,
    Case,
    N,
    V,
    assert_equal_losses,
    assert_equal_results,
    make_case,
    possible,
    relative,
    row_bytes,
)

EVERY_FORM = [*FORMS, *SPARSE]


# ---------------------------------------------------------------------------------------------------- smoothing, z-loss


@pytest.mark.parametrize("form", EVERY_FORM)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_smoothing_and_z_loss_equal_the_reference(divergence: str, form: str) -> None:
    if not possible(divergence, form):
        return
    case = make_case()
    grid = itertools.product((0.0, 0.2), (0.0, 0.05), (1.0, 2.0), (0.0, 0.3, 1.0))
    for smoothing, z_loss, temperature, alpha in grid:
        if smoothing == z_loss == 0:
            continue
        options = LossOptions(
            divergence,
            student_temperature=temperature,
            alpha=alpha,
            beta=0.3,
            scale_t2=True,
            label_smoothing=smoothing,
            z_loss=z_loss,
            chunk_bytes=4 * row_bytes(V),
        )
        assert_equal_losses(case, form, options, -2.0, 1e-11, labels=case.labels, token_weights=case.token_weights)


@pytest.mark.parametrize("form", [form for form in EVERY_FORM if form != "none"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_z_loss_without_labels(form: str, temperature: float) -> None:
    case = make_case()
    for weights in (None, case.token_weights):
        options = LossOptions(student_temperature=temperature, z_loss=0.02, chunk_bytes=4 * row_bytes(V))
        assert_equal_losses(case, form, options, 3.0, 1e-11, token_weights=weights)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_labels_alone_equal_torch(smoothing: float, dtype: torch.dtype) -> None:
    case = make_case().to(dtype)
    bound = 1e-11 if dtype == F64 else 1e-5
    logits = F.linear(case.hidden, case.weight, case.bias)
    wanted = F.cross_entropy(logits, case.labels, label_smoothing=smoothing)
    expected = torch.autograd.grad(wanted, case.student, retain_graph=True)
    options = LossOptions(label_smoothing=smoothing, chunk_bytes=3 * row_bytes(V))
    result = linear_cross_entropy(case.hidden, case.weight, case.labels, bias=case.bias, options=options)
    for value, want in zip((result.loss, *torch.autograd.grad(result.loss, case.student)), (wanted, *expected), strict=True):
        assert relative(value, want) < bound
    leaf = logits.detach().requires_grad_()
    loss = softmax_kl(leaf, labels=case.labels, options=options).loss
    (want,) = torch.autograd.grad(wanted, logits)
    assert relative(torch.autograd.grad(loss, leaf)[0], want) < bound
    # Smoothing is part of the loss, and not of the number that is reported.
    assert relative(result.cross_entropy, F.cross_entropy(logits, case.labels, reduction="sum").detach()) < bound


def test_z_loss_by_hand() -> None:
    """Adding a constant c to every logit moves the z-loss alone: z (L + c)^2."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]], dtype=F64))  # log sum exp 0
    for shift in (0.0, 3.0):
        result = softmax_kl(logits + shift, logits, options=LossOptions(z_loss=0.1, student_temperature=2.0))
        plain = softmax_kl(logits, logits, options=LossOptions(student_temperature=2.0))
        assert (result.loss - plain.loss).item() == pytest.approx(0.1 * shift**2, abs=1e-12)
        assert relative(result.divergence, plain.divergence) < 1e-12


def test_gradcheck_of_all_terms_together() -> None:
    case = make_case(4, 5, 3, 2, ignored=1)
    for form, temperature in itertools.product(("none", "ids", "hidden", "tail"), (1.0, 2.0)):
        options = LossOptions(
            "jsd", 1.0, temperature, 0.3, scale_t2=True, label_smoothing=0.2, z_loss=0.1, chunk_bytes=2 * row_bytes(5)
        )

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor, form: str = form, options: LossOptions = options) -> Tensor:
            teacher = case.sparse("tail", 2) if form == "tail" else case.teacher(form)
            targets = {"labels": case.labels, "token_weights": case.token_weights}
            return linear_distillation_loss(hidden, weight, bias=bias, **teacher, **targets, options=options).loss

        assert torch.autograd.gradcheck(loss, case.student, fast_mode=False)


def test_positions_that_do_not_count_reach_neither_term() -> None:
    case = make_case(ignored=0)
    with torch.no_grad():
        case.hidden[:4] = torch.nan
    labels = case.labels.clone()
    labels[:4] = -100
    options = LossOptions(label_smoothing=0.2, z_loss=0.1, chunk_bytes=3 * row_bytes(V))
    result = case.loss("none", options, labels=labels)
    kept = case.hidden[4:].detach().requires_grad_()
    wanted = linear_cross_entropy(kept, case.weight, labels[4:], bias=case.bias, options=options)
    gradients = torch.autograd.grad(result.loss, case.student)
    expected = torch.autograd.grad(wanted.loss, (kept, case.weight, case.bias))
    assert relative(result.loss, wanted.loss) < 1e-12
    assert torch.equal(gradients[0][:4], torch.zeros_like(gradients[0][:4]))
    for value, want in zip((gradients[0][4:], *gradients[1:]), expected, strict=True):
        assert relative(value, want) < 1e-12


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"label_smoothing": float("nan")}, "label_smoothing"),
        ({"z_loss": -1e-4}, "z_loss"),
        ({"z_loss": float("inf")}, "z_loss"),
        ({"z_loss": float("nan")}, "z_loss"),
    ],
)
def test_options_refuse_bad_terms(settings: dict[str, float], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: must [^\n]*$"):
        LossOptions(**settings)


# ------------------------------------------------------------------------------------------------------------ recompute


@pytest.mark.parametrize("form", EVERY_FORM)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_recomputed_gradients_are_the_same(divergence: str, form: str) -> None:
    if not possible(divergence, form):
        return
    case = make_case()
    options = LossOptions(divergence, 1.0, 2.0, 0.3, label_smoothing=0.1, z_loss=0.01, chunk_bytes=3 * row_bytes(V))
    targets: dict[str, Any] = {"labels": case.labels, "token_weights": case.token_weights}
    kept = case.loss(form, options, **targets)
    again = case.loss(form, dataclasses.replace(options, recompute=True), **targets)
    for value, want in zip(again[:4], kept[:4], strict=True):
        assert relative(value, want) < 1e-14  # not equal: without a gradient more rows fit into a chunk
    wanted = torch.autograd.grad(kept.loss, case.student, torch.tensor(-3.0, dtype=F64))
    for factor in (1.0, 2.0):  # a second backward too
        upstream = torch.tensor(-3.0 * factor, dtype=F64)
        for value, want in zip(torch.autograd.grad(again.loss, case.student, upstream, retain_graph=True), wanted, strict=True):
            assert relative(value, factor * want) < 1e-14


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=3))[1:])
def test_recompute_makes_the_needed_gradients(needed: tuple[bool, ...]) -> None:
    case = make_case()
    expected = torch.autograd.grad(case.loss("hidden", LossOptions()).loss, case.student)
    for leaf, wanted in zip(case.student, needed, strict=True):
        leaf.requires_grad_(wanted)
    case.loss("hidden", LossOptions(recompute=True)).loss.backward()
    for leaf, wanted, want in zip(case.student, needed, expected, strict=True):
        assert (leaf.grad is not None) == wanted
        if leaf.grad is not None:
            assert relative(leaf.grad, want) < 1e-13


def test_recompute_without_a_bias_and_in_16_bit() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        case = make_case(bias=False).to(dtype)
        kept = torch.autograd.grad(case.loss("hidden", LossOptions()).loss, case.student)
        again = torch.autograd.grad(case.loss("hidden", LossOptions(recompute=True)).loss, case.student)
        for value, want in zip(again[:4], kept[:4], strict=True):
            assert value.dtype == dtype
            assert torch.equal(value, want)


@pytest.mark.parametrize("form", ["none", "hidden", "tail"])
def test_gradcheck_of_recompute(form: str) -> None:
    case = make_case(4, 7, 3, 2, ignored=1)
    options = LossOptions("forward_kl", 1.0, 2.0, 0.3, recompute=True, chunk_bytes=2 * row_bytes(7))

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        moved = dataclasses.replace(case, hidden=hidden, weight=weight, bias=bias)
        return moved.loss(form, options, labels=case.labels).loss

    assert torch.autograd.gradcheck(loss, case.student, fast_mode=False)


# --------------------------------------------------------------------------------------------------- common vocabulary


def narrowed(case: Case, student: int, teacher: int) -> Case:
    """The heads cut to the first classes, as new leaves."""
    assert case.bias is not None
    assert case.teacher_bias is not None
    return dataclasses.replace(
        case,
        weight=case.weight[:student].detach().requires_grad_(),
        bias=case.bias[:student].detach().requires_grad_(),
        teacher_weight=case.teacher_weight[:teacher],
        teacher_bias=case.teacher_bias[:teacher],
        labels=case.labels.clamp(max=min(student, teacher) - 1),
    )


@pytest.mark.parametrize(("student", "teacher"), [(V, 30), (30, V), (V, V)])
@pytest.mark.parametrize("form", ["logits", "hidden"])
@pytest.mark.parametrize("recompute", [False, True])
def test_vocabularies_of_two_sizes(student: int, teacher: int, form: str, recompute: bool) -> None:
    """As if the larger one were cut: its further classes have no probability and no gradient."""
    common = min(student, teacher)
    full = make_case()
    case, cut = narrowed(full, student, teacher), narrowed(full, common, common)
    options = LossOptions(
        "jsd",
        0.7,
        2.0,
        0.3,
        common_vocabulary=True,
        recompute=recompute,
        label_smoothing=0.1,
        z_loss=0.1,
        chunk_bytes=3 * row_bytes(V),
    )
    targets = {"labels": case.labels, "token_weights": case.token_weights}
    result = case.loss(form, options, **targets)
    wanted = cut.reference(form, dataclasses.replace(options, common_vocabulary=False), **targets)
    gradients = torch.autograd.grad(result.loss, case.student, retain_graph=True)
    assert torch.equal(gradients[1][common:], torch.zeros_like(gradients[1][common:]))
    assert torch.equal(gradients[2][common:], torch.zeros_like(gradients[2][common:]))
    for value, want in zip(result[:4], wanted[:4], strict=True):
        assert relative(value, want) < 1e-11
    expected = torch.autograd.grad(wanted.loss, cut.student)
    for value, want in zip((gradients[0], gradients[1][:common], gradients[2][:common]), expected, strict=True):
        assert relative(value, want) < 1e-11
    # The reference itself, against the same cut.
    assert_equal_results(
        result,
        case.student,
        distillation_loss(
            F.linear(case.hidden, case.weight, case.bias), teacher_logits=case.teacher_logits(), options=options, **targets
        ),
        2.0,
        1e-11,
    )


@pytest.mark.parametrize(("student", "teacher"), [(V, 30), (30, V)])
@pytest.mark.parametrize("in_place", [False, True])
def test_logits_of_two_sizes(student: int, teacher: int, in_place: bool) -> None:
    full = make_case()
    whole, other = F.linear(full.hidden, full.weight, full.bias).detach(), full.teacher_logits()
    common = min(student, teacher)
    leaf, cut = (whole[:, :size].clone().requires_grad_() for size in (student, common))
    wanted = distillation_loss(cut, teacher_logits=other[:, :common])
    (expected,) = torch.autograd.grad(wanted.loss, cut)
    result = softmax_kl(leaf, other[:, :teacher], options=LossOptions(common_vocabulary=True), in_place=in_place)
    (gradient,) = torch.autograd.grad(result.loss, leaf)
    assert relative(result.loss, wanted.loss) < 1e-12
    assert relative(gradient[:, :common], expected) < 1e-12
    assert torch.equal(gradient[:, common:], torch.zeros(N, student - common, dtype=F64))


def test_vocabularies_of_two_sizes_are_refused_unless_asked_for() -> None:
    case = narrowed(make_case(), V, 30)
    for form in ("logits", "hidden"):
        with pytest.raises(
            ValueError, match=rf"^teacher_\w+: the teacher has 30 classes, the student {V}; .*common_vocabulary=True"
        ):
            case.loss(form, LossOptions())
    for call in (softmax_kl, distillation_loss):
        with pytest.raises(ValueError, match=r"^teacher_logits: the teacher has 30 classes"):
            call(torch.zeros(2, 37), torch.zeros(2, 30))
    with pytest.raises(RuntimeError, match=r"out of bounds"):  # a label that the teacher lacks
        case.loss("hidden", LossOptions(common_vocabulary=True), labels=torch.full((N,), 33))


# ------------------------------------------------------------------------------------------------- sizes, any options


@pytest.mark.parametrize("classes", [1, 2, 3, 31, 4097, 50257])
@pytest.mark.parametrize("form", [*FORMS, "tail", "sampled"])
def test_sizes_of_the_vocabulary(classes: int, form: str) -> None:
    n = 13 if classes < 1000 else 3
    case = make_case(n, classes, 4, 3, ignored=1)
    teacher = case.sparse(form, min(2, classes)) if form in SPARSE else case.teacher(form)
    options = LossOptions(alpha=0.3, student_temperature=2.0, label_smoothing=0.1, z_loss=0.1, chunk_bytes=2 * row_bytes(classes))
    result = case.linear(labels=case.labels, **teacher, options=options)
    if form == "hidden":
        teacher = case.teacher("logits")
    logits = F.linear(case.hidden, case.weight, case.bias)
    wanted = distillation_loss(logits, labels=case.labels, **teacher, options=options)
    if classes > 1:
        assert_equal_results(result, case.student, wanted, -3.0, 1e-10)
    else:
        # Of one class only the z-loss is not 0, and that of its logit is the whole gradient.
        torch.testing.assert_close(tuple(result), tuple(wanted))
        gradients, expected = (torch.autograd.grad(r.loss, case.student) for r in (result, wanted))
        torch.testing.assert_close(gradients, expected)
        assert expected[2].norm() > 0


@pytest.mark.parametrize("form", EVERY_FORM)
@pytest.mark.parametrize("recompute", [False, True])
def test_no_positions(form: str, recompute: bool) -> None:
    case = make_case(0)
    options = LossOptions(alpha=0.5, label_smoothing=0.1, z_loss=0.1, student_temperature=2.0, recompute=recompute)
    result = case.loss(form, options, labels=case.labels)
    result.loss.backward()
    assert [x.item() for x in result[:4]] == [0, 0, 0, 0]
    assert [None if leaf.grad is None else leaf.grad.abs().sum().item() for leaf in case.student] == [0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_and_options(data: st.DataObject) -> None:
    def draw(strategy: st.SearchStrategy[Any]) -> Any:
        return data.draw(strategy)

    n, v, d, e = (draw(st.integers(1, high)) for high in (9, 20, 6, 6))
    divergence, form = draw(st.sampled_from(DIVERGENCES)), draw(st.sampled_from(EVERY_FORM))
    if not possible(divergence, form):
        form = "hidden"
    options = LossOptions(
        divergence,
        student_temperature=draw(st.sampled_from([1.0, 0.7, 3.0])),
        alpha=draw(st.sampled_from([0.0, 0.25, 1.0])),
        beta=draw(st.floats(0.05, 0.95)),
        scale_t2=draw(st.booleans()),
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 0.99])),
        z_loss=draw(st.sampled_from([0.0, 0.1])),
        recompute=draw(st.booleans()),
        chunk_bytes=draw(st.one_of(st.none(), st.integers(1, 4000))),
    )
    case = make_case(n, v, d, e, seed=draw(st.integers(0, 9)), bias=draw(st.booleans()), ignored=draw(st.integers(0, n)))
    teacher = case.sparse(form, draw(st.integers(1, v))) if form in SPARSE else case.teacher(form)
    targets: dict[str, Any] = {"labels": case.labels, "options": options}
    if draw(st.booleans()):
        targets["token_weights"] = case.token_weights
    if draw(st.booleans()):
        targets["denominator"] = 7.0
    result = case.linear(**targets, **teacher)
    logits = F.linear(case.hidden, case.weight, case.bias)
    wanted = distillation_loss(logits, **targets, **(case.teacher("logits") if form == "hidden" else teacher))
    # One class, or nothing counted: the exact answer is 0, which a relative bound does not fit.
    torch.testing.assert_close(tuple(result), tuple(wanted), rtol=1e-9, atol=1e-13)
    upstream = torch.tensor(draw(st.sampled_from([1.0, -3.0])), dtype=F64)
    for value, expected in zip(
        torch.autograd.grad(result.loss, case.student, upstream),
        torch.autograd.grad(wanted.loss, case.student, upstream),
        strict=True,
    ):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-13)
