"""Shapes of logits, weighted sums, outputs and losses of each position: against the reference, in torch and in Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from megapd_kernels import (
    JSD,
    LK,
    AlphaBeta,
    ForwardKL,
    LossOptions,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
    distillation_loss,
    linear_cross_entropy,
    linear_distillation_loss,
    softmax_kl,
)
from megapd_kernels.divergences import NAMES

from .cases import DIVERGENCES, F64, Case, assert_equal_losses, assert_equal_results, interpreter, make_case, relative, row_bytes

NEW = ["skewed_forward_kl", "skewed_reverse_kl", "alpha_beta", "lk"]
SUM = 0.7 * ForwardKL() + 0.3 * ReverseKL() + 0.2 * JSD(0.01)
# fmt: off
CHANGES: dict[str, dict[str, Any]] = {
    **{name: {"divergence": name} for name in NEW},
    "skew .7": {"divergence": SkewedForwardKL(0.7)}, "skew .9": {"divergence": SkewedReverseKL(0.9)},
    "alpha 1.3": {"divergence": AlphaBeta(1.3, 0.4)}, "sum": {"divergence": SUM},
    "cap": {"soft_cap": 1.5}, "scale": {"logit_scale": 0.5},
    "both shapes": {"soft_cap": 2.0, "logit_scale": 1.5, "teacher_soft_cap": 3.0, "teacher_logit_scale": 0.3},
    "cap and smoothing": {"soft_cap": 2.0, "label_smoothing": 0.1, "divergence": "jsd"},
    "top p": {"teacher_top_p": 0.6, "divergence": "jsd"},
    "top p capped": {"teacher_top_p": 0.8, "teacher_soft_cap": 1.0},
    "student top k": {"student_top_k": 4, "divergence": "reverse_kl"},
    "student top k capped": {"student_top_k": 4, "divergence": SUM, "soft_cap": 2.0, "teacher_soft_cap": 3.0},
    "agreement": {"per_token": True, "top_k_agreement": 3},
}
# fmt: on


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", ["logits", "hidden"])
@pytest.mark.parametrize("change", CHANGES)
def test_equals_the_reference(change: str, form: str, reduction: Any) -> None:
    case = make_case()
    changes: dict[str, Any] = {"per_token": True, **CHANGES[change]}
    for temperature in (1.0, 2.0):
        options = LossOptions(
            alpha=0.3, z_loss=0.01, student_temperature=temperature, reduction=reduction, chunk_bytes=4 * row_bytes(37), **changes
        )
        targets: dict[str, Any] = {"labels": case.labels, "token_weights": case.token_weights}
        if "label_smoothing" not in changes:
            targets["class_weights"] = torch.rand(37, dtype=F64)
        assert_each_equal(case, form, options, **targets)


def assert_each_equal(case: Case, form: str, options: LossOptions, **targets: Any) -> None:
    """Also for a loss of each position, with its own upstream gradient."""
    if options.reduction == "mean":
        assert_equal_losses(case, form, options, -3.0, 1e-11, **targets)
        return
    upstream = torch.randn(len(case.hidden), dtype=F64)
    result, wanted = case.loss(form, options, **targets), case.reference(form, options, **targets)
    for value, want in zip(
        (result.loss, *torch.autograd.grad(result.loss, case.student, upstream)),
        (wanted.loss, *torch.autograd.grad(wanted.loss, case.student, upstream)),
        strict=True,
    ):
        assert relative(value, want) < 1e-11


@interpreter
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # as in test_triton.py
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("linear", [True, False])
def test_triton_equals_the_reference(change: str, linear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAPD_KERNELS", "triton")
    changes: dict[str, Any] = {"per_token": True, **CHANGES[change]}
    options = LossOptions(alpha=0.3, z_loss=0.01, student_temperature=2.0, **changes)
    case = make_case(n=5).to(torch.float32)
    targets = {"labels": case.labels.roll(2), "token_weights": case.token_weights}
    if linear:
        assert_equal_losses(case, "hidden", options, 2.0, 2e-5, **targets)
        return
    logits = F.linear(case.hidden, case.weight, case.bias).detach().requires_grad_()
    wide = logits.detach().double().requires_grad_()
    teacher = case.teacher_logits()
    result = softmax_kl(logits, teacher, options=options, **targets)
    wanted = distillation_loss(wide, teacher.double(), options=options, **targets)
    assert_equal_results(result, (logits,), wanted, 2.0, 2e-5, wanted_leaves=(wide,))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*DIVERGENCES, *NEW, SUM, LK() + 0.1 * ForwardKL()]),
    st.sampled_from([None, 0.5, 4.0]),
    st.sampled_from([1.0, 0.2, 3.0]),
    st.sampled_from([None, 0.5, 4.0]),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from(["mean", "none"]),
    st.sampled_from(["logits", "hidden", "tail"]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_any_combination(
    divergence: Any,
    cap: Any,
    scale: float,
    teacher_cap: Any,
    temperature: float,
    reduction: Any,
    form: str,
    per_token: bool,
    seed: int,
) -> None:
    options = LossOptions(
        divergence,
        soft_cap=cap,
        logit_scale=scale,
        teacher_soft_cap=teacher_cap,
        student_temperature=temperature,
        teacher_temperature=1.0 if form == "tail" else temperature,
        scale_t2=True,
        alpha=0.25,
        reduction=reduction,
        per_token=per_token,
    )
    assert_each_equal(make_case(seed=seed), form, options, labels=make_case(seed=seed).labels)


@pytest.mark.parametrize("name", [name for name in NAMES if name in [*DIVERGENCES, *NEW]])
def test_the_slopes_are_the_formulas_derivatives(name: str) -> None:
    """dD/da from u, against autograd of t through the softmax; the same from the function in Triton."""
    torch.manual_seed(0)
    member = LossOptions(name).mixture.members[0][1]
    a = torch.randn(3, 11, dtype=F64, requires_grad=True)
    log_p, log_q = a.log_softmax(1), torch.randn(3, 11, dtype=F64).log_softmax(1)
    value = member.value(member.terms(log_p, log_q).sum(1))
    (wanted,) = torch.autograd.grad(value.sum(), a)
    p, q = log_p.detach().exp(), log_q.exp()
    free = [torch.empty_like(p) for _ in range(member.scratch)]
    found, gradient, _ = member.rows(log_p.detach().clone(), log_q.clone(), free, lambda x: x)
    assert relative(found, value.detach()) < 1e-12
    assert relative(gradient, wanted) < 1e-12
    slopes = member.slopes(log_p.detach(), log_q, p, q)
    gradient = slopes - p * slopes.sum(1, keepdim=True)
    factor = member.value_slope(member.terms(log_p.detach(), log_q).sum(1))
    assert relative(gradient if factor is None else gradient * factor[:, None], wanted) < 1e-12


def test_gradcheck() -> None:
    case = make_case(4, 9, 3, 3)
    for name in NEW:
        options = LossOptions(name, soft_cap=2.0, reduction="none", alpha=0.2)
        labels = case.labels.clamp(min=0)

        def loss(*student: Tensor, options: LossOptions = options, labels: Tensor = labels) -> Tensor:
            hidden, weight, bias = student
            return linear_distillation_loss(
                hidden, weight, bias=bias, labels=labels, **case.teacher("hidden"), options=options
            ).loss

        assert torch.autograd.gradcheck(loss, case.student)


def test_limits_of_the_new_divergences() -> None:
    student, teacher = torch.randn(2, 6, 40, dtype=F64).unbind()

    def value(divergence: Any) -> float:
        return softmax_kl(student, teacher, options=LossOptions(divergence)).loss.item()

    assert value(SkewedForwardKL(1e-9)) == pytest.approx(value("forward_kl"), rel=1e-6)
    assert value(SkewedReverseKL(1e-9)) == pytest.approx(value("reverse_kl"), rel=1e-6)
    assert value(AlphaBeta(1.0, 1e-6)) == pytest.approx(value("forward_kl"), rel=1e-4)
    assert value(AlphaBeta(1e-6, 1.0)) == pytest.approx(value("reverse_kl"), rel=1e-4)
    jsd = 0.3 * SkewedForwardKL(0.3) + 0.7 * SkewedReverseKL(0.7)
    assert value(jsd) == pytest.approx(value(JSD(0.3)), rel=1e-12)
    overlap = torch.minimum(student.softmax(1), teacher.softmax(1)).sum(1)
    assert value("lk") == pytest.approx(-overlap.log().mean().item(), rel=1e-12)
    p, q, half = student.softmax(1), teacher.softmax(1), (student.softmax(1) * teacher.softmax(1)).sqrt().sum(1)
    assert value(AlphaBeta(0.5, 0.5)) == pytest.approx((4 * (1 - half)).mean().item(), rel=1e-12)  # 4 of squared Hellinger
    assert value(AlphaBeta(1.0, 1.0)) == pytest.approx(((p - q).square().sum(1) / 2).mean().item(), rel=1e-12)


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3), (1, 6)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    case = make_case(6)
    options = LossOptions("jsd", alpha=0.3, per_token=True, reduction="none")

    def wide(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, shape)

    for form in ("hidden", "logits", "tail", "ids"):
        targets = {"labels": case.labels.int(), "token_weights": case.token_weights}
        flat = case.loss(form, options, **targets)
        teacher = {n: wide(t) if isinstance(t, Tensor) and len(t) == 6 else t for n, t in case.teacher(form).items()}
        result = linear_distillation_loss(
            wide(case.hidden), case.weight, bias=case.bias, **teacher, **{n: wide(t) for n, t in targets.items()}, options=options
        )
        assert result.tokens is not None
        assert flat.tokens is not None
        assert result.loss.shape == shape
        assert torch.equal(result.loss.flatten(), flat.loss)
        assert result.tokens.divergences.shape == (1, *shape)
        for value, wanted in zip(result.tokens[1:], flat.tokens[1:], strict=True):
            assert value.shape == shape
            assert torch.equal(value.flatten(), wanted)
        upstream = torch.randn(6, dtype=F64)
        for value, wanted in zip(
            torch.autograd.grad(result.loss, case.student, wide(upstream)),
            torch.autograd.grad(flat.loss, case.student, upstream),
            strict=True,
        ):
            assert relative(value, wanted) < 1e-12
    with pytest.raises(ValueError, match=r"^labels: expected the student's leading dimensions"):
        linear_cross_entropy(wide(case.hidden), case.weight, case.labels)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.uint8])
def test_masks(dtype: torch.dtype) -> None:
    case = make_case()
    mask = torch.arange(13) % 3 != 0
    wanted = case.loss("hidden", LossOptions(), token_weights=mask.double())
    assert torch.equal(case.loss("hidden", LossOptions(), token_weights=mask.to(dtype)).loss, wanted.loss)
    with pytest.raises(ValueError, match=r"^token_weights: expected a floating-point type, a bool or int mask"):
        case.loss("hidden", LossOptions(), token_weights=torch.ones(13, dtype=torch.complex64))


def test_class_weights_are_those_of_torch() -> None:
    case = make_case()
    weights = torch.rand(37, dtype=F64)
    logits = F.linear(case.hidden, case.weight, case.bias)
    for reduction in ("mean", "none"):
        result = linear_cross_entropy(
            case.hidden, case.weight, case.labels, bias=case.bias, class_weights=weights, options=LossOptions(reduction=reduction)
        )
        wanted = F.cross_entropy(logits, case.labels, weights, reduction=reduction)
        assert relative(result.loss, wanted) < 1e-12
        upstream = torch.randn_like(wanted)
        for value, want in zip(
            torch.autograd.grad(result.loss, case.student, upstream),
            torch.autograd.grad(wanted, case.student, upstream, retain_graph=True),
            strict=True,
        ):
            assert relative(value, want) < 1e-12
    with pytest.raises(ValueError, match=r"^class_weights: cannot be combined with label_smoothing"):
        case.loss("none", LossOptions(label_smoothing=0.1), labels=case.labels, class_weights=weights)
    with pytest.raises(ValueError, match=r"^class_weights: expected shape \[37\]"):
        case.loss("none", LossOptions(), labels=case.labels, class_weights=weights[1:])


def test_a_banned_class_stays_banned_under_a_cap() -> None:
    student = torch.randn(4, 9, dtype=F64).requires_grad_()
    teacher = torch.randn(4, 9, dtype=F64)
    with torch.no_grad():
        student[:, 7:], teacher[:, 7:] = -torch.inf, -torch.inf
    options = LossOptions(soft_cap=2.0, teacher_soft_cap=2.0, logit_scale=3.0)
    result = softmax_kl(student, teacher, options=options)
    part = student.detach()[:, :7].requires_grad_()
    wanted = softmax_kl(part, teacher[:, :7], options=options)
    assert relative(result.loss, wanted.loss) < 1e-12
    (gradient,) = torch.autograd.grad(result.loss, student)
    assert relative(gradient[:, :7], torch.autograd.grad(wanted.loss, part)[0]) < 1e-12
    assert gradient[:, 7:].eq(0).all()


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("^divergence: 'kl' is not one of forward_kl", {"divergence": "kl"}),
        ("^beta: must lie strictly between 0 and 1", {"divergence": "jsd", "beta": 1.0}),
        ("^soft_cap: must be above 0", {"soft_cap": 0.0}),
        ("^teacher_logit_scale: must be above 0", {"teacher_logit_scale": -1.0}),
        ("^student_temperature: must be at least 1e-7", {"soft_cap": 30.0, "student_temperature": 1e-9}),
        ("^reduction: 'sum' is not one of mean, none", {"reduction": "sum"}),
        ("^top_k_agreement: needs per_token=True", {"top_k_agreement": 3}),
        ("^teacher_top_p: must lie", {"teacher_top_p": 0.0}),
        ("^teacher_top_p: reverse_kl is infinite", {"teacher_top_p": 0.9, "divergence": "reverse_kl"}),
        ("^student_top_k: must be at least 1", {"student_top_k": 0}),
        ("^student_top_k: needs the teacher's whole softmax", {"student_top_k": 3, "teacher_temperature": 0.0}),
        ("^teacher_temperature: alpha_beta is not a sum", {"divergence": "alpha_beta", "teacher_temperature": 0.0}),
        ("^product_dtype: must be a floating-point type", {"product_dtype": torch.int8}),
    ],
)
def test_options_without_a_meaning_are_refused(match: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=match):
        LossOptions(**changes)


def test_weighted_sums_without_a_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^divergence: the weight of forward_kl must be above 0"):
        0.0 * ForwardKL() + ReverseKL()
    assert (2 * (ForwardKL() + ReverseKL())).members == ((2.0, ForwardKL()), (2.0, ReverseKL()))
    assert SUM.name == "0.7 forward_kl + 0.3 reverse_kl + 0.2 jsd"
