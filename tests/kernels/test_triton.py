"""The Triton kernels against the float64 reference: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megapd_kernels import LossOptions, LossResult, distillation_loss, softmax_kl

from .cases import DIVERGENCES, F64, FORMS, Case, interpreter, make_case, possible, relative

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from megapd_kernels.divergences.triton_functions import expm1, log1p  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = 1e-5


# The interpreter computes with numpy, which warns of what the kernels mean to do: exp2(-inf), inf - inf behind a where.
pytestmark = [pytest.mark.slow, interpreter, pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")]


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAPD_KERNELS", "triton")


def moved(case: Case, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Case:
    case = case.to(dtype)
    parts = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    return Case(**{n: t if t is None else t.detach().to(device).requires_grad_(t.requires_grad) for n, t in parts.items()})


def assert_reference(
    result: LossResult, inputs: tuple[Tensor, ...], wanted: LossResult, leaves: tuple[Tensor, ...], bound: float = BOUND
) -> None:
    gradients = torch.autograd.grad(result.loss, inputs, torch.tensor(-3.0, device=DEVICE))
    expected = torch.autograd.grad(wanted.loss, leaves, torch.tensor(-3.0, dtype=F64, device=DEVICE))
    for name, value, want in zip(LossResult._fields[:4], result[:4], wanted[:4], strict=True):
        assert relative(value, want) < bound, name
    for value, want in zip(gradients, expected, strict=True):
        assert want.norm() > 0
        assert relative(value, want) < bound


EXTRAS = [
    {},
    {"student_temperature": 2.0, "scale_t2": True},
    {"alpha": 0.3, "z_loss": 0.01, "label_smoothing": 0.1, "student_temperature": 2.0},
    {"alpha": 0.3, "z_loss": 0.01, "label_smoothing": 0.1},
    {"alpha": 1.0},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_linear_losses_equal_the_reference(divergence: str, form: str) -> None:
    if not possible(divergence, form):
        return
    for extras, masked in zip(EXTRAS, itertools.cycle((True, False))):
        case = moved(make_case(5, 37, 8, 5, ignored=3))
        options = LossOptions(divergence, 0.7, beta=0.3, chunk_bytes=2000, **extras)
        targets: dict[str, Any] = {"labels": case.labels if masked else case.labels.clamp(min=0)}
        if masked:
            targets["token_weights"] = case.token_weights
        wide = moved(case, F64)
        wanted = wide.reference(form, options, **{n: t.double() if t.is_floating_point() else t for n, t in targets.items()})
        assert_reference(case.loss(form, options, **targets), case.student, wanted, wide.student)


def softmax_case(n: int, v: int, spread: float, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (spread * torch.randn(n, v, generator=generator) for _ in range(2))
    labels = torch.randint(v, (n,), generator=generator)
    return student.to(DEVICE, dtype).requires_grad_(), teacher.to(DEVICE, dtype), labels.to(DEVICE)


def assert_softmax(student: Tensor, teacher: Tensor | None, options: LossOptions, bound: float = BOUND, **targets: Any) -> None:
    leaf = student.detach().double().requires_grad_()
    wide = None if teacher is None else teacher.double()
    wanted = distillation_loss(leaf, teacher_logits=wide, options=options, **targets)
    assert_reference(softmax_kl(student, teacher, options=options, **targets), (student,), wanted, (leaf,), bound)


@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_of_several_spreads_and_blocks(divergence: str, spread: float) -> None:
    """5003 classes: two whole blocks and a part of a third."""
    student, teacher, labels = softmax_case(2, 5003, spread, torch.float32)
    options = LossOptions(divergence, 0.8, 1.5, 0.2, beta=0.4, z_loss=1e-3)
    # A TVD's gradient is as rough as sign(p - q): where the two agree to the last digit, either sign is right. A reverse KL's is
    # p (d - D), the difference of numbers of order 100 where p is near 1.
    bound = {"tvd": 1e-4, "reverse_kl": 5e-5}.get(divergence, BOUND)
    assert_softmax(student, teacher, options, bound, labels=labels)


@pytest.mark.parametrize("v", [1, 2, 3, 17, 2048, 2049])
def test_every_vocabulary_size(v: int) -> None:
    student, teacher, labels = softmax_case(2, v, 2.0, torch.float32)
    for divergence in DIVERGENCES:
        result = softmax_kl(student, teacher, labels=labels, options=LossOptions(divergence, alpha=0.5))
        leaf = student.detach().double().requires_grad_()
        wanted = distillation_loss(
            leaf, teacher_logits=teacher.double(), labels=labels, options=LossOptions(divergence, alpha=0.5)
        )
        torch.testing.assert_close(result.loss.double(), wanted.loss, rtol=1e-5, atol=1e-7)
        (g,), (e,) = torch.autograd.grad(result.loss, student), torch.autograd.grad(wanted.loss, leaf)
        torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_16_bit_logits(divergence: str, dtype: torch.dtype) -> None:
    """The gradient is rounded once, at the end (the interpreter truncates to bf16 instead: twice the error)."""
    student, teacher, labels = softmax_case(4, 300, 2.0, dtype)
    options = LossOptions(divergence, alpha=0.2)
    leaf = student.detach().double().requires_grad_()
    wanted = distillation_loss(leaf, teacher_logits=teacher.double(), labels=labels, options=options)
    result = softmax_kl(student, teacher, labels=labels, options=options)
    assert relative(result.loss, wanted.loss) < BOUND
    (gradient,) = torch.autograd.grad(result.loss, student)
    (expected,) = torch.autograd.grad(wanted.loss, leaf)
    assert gradient.dtype == dtype
    assert relative(gradient, expected) < torch.finfo(dtype).eps


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_near_its_teacher(divergence: str) -> None:
    _, teacher, _ = softmax_case(3, 400, 3.0, torch.float32)
    generator = torch.Generator().manual_seed(5)
    student = (teacher + 1e-2 * torch.randn(3, 400, generator=generator).to(DEVICE)).requires_grad_()
    result = softmax_kl(student, teacher, options=LossOptions(divergence))
    leaf = student.detach().double().requires_grad_()
    wanted = distillation_loss(leaf, teacher_logits=teacher.double(), options=LossOptions(divergence))
    assert abs(result.loss.item() - wanted.loss.item()) < 1e-6  # D is 5e-5: a difference of sums of order 1
    assert result.loss.item() >= 0
    (gradient,), (expected,) = torch.autograd.grad(result.loss, student), torch.autograd.grad(wanted.loss, leaf)
    assert relative(gradient, expected) < 2e-4


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_saturated_rows_and_large_offsets(divergence: str) -> None:
    student, teacher, labels = softmax_case(4, 64, 1.0, torch.float32)
    with torch.no_grad():
        student[0, 3] += 200.0  # the student is sure of another class than the teacher
        teacher[0, 9] += 200.0
        student[1] += 1e4  # an offset that both softmaxes ignore
        teacher[1] -= 1e4
        student[2] *= 50.0
    assert_softmax(student, teacher, LossOptions(divergence, alpha=0.1), labels=labels)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_banned_classes(divergence: str) -> None:
    student, teacher, labels = softmax_case(4, 2100, 2.0, torch.float32)
    with torch.no_grad():
        student[:, :2060], teacher[:, :2060] = -math.inf, -math.inf  # a whole block and more
        labels = labels % 40 + 2060
        if divergence not in ("reverse_kl",):
            teacher[1, 2070:2080] = -math.inf
        if divergence in ("jsd", "tvd", "reverse_kl"):
            student[2, 2070:2080] = -math.inf
            labels[2] = 2061
    assert_softmax(student, teacher, LossOptions(divergence, alpha=0.3), labels=labels)


def test_a_class_that_the_student_alone_bans() -> None:
    student, teacher, _ = softmax_case(2, 50, 1.0, torch.float32)
    with torch.no_grad():
        student[0, 7] = -math.inf
    assert softmax_kl(student, teacher).loss.item() == math.inf
    with torch.no_grad():
        teacher[0, 7] = -1e4  # its probability underflows: nothing is asked of the student there
    result = softmax_kl(student, teacher)
    assert math.isfinite(result.loss.item())
    assert torch.isfinite(torch.autograd.grad(result.loss, student)[0]).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_nan_that_counts_is_not_hidden(divergence: str) -> None:
    for side in (0, 1):
        student, teacher, _ = softmax_case(3, 40, 1.0, torch.float32)
        with torch.no_grad():
            (student, teacher)[side][1, 5] = math.nan
        result = softmax_kl(student, teacher, options=LossOptions(divergence))
        assert math.isnan(result.loss.item())
        (gradient,) = torch.autograd.grad(result.loss, student)
        assert torch.isnan(gradient[1]).any()
        assert torch.isfinite(gradient[[0, 2]]).all()


@pytest.mark.parametrize("divergence", [*DIVERGENCES, "none"])
def test_rows_that_do_not_count_are_not_read(divergence: str) -> None:
    student, teacher, labels = softmax_case(5, 40, 1.0, torch.float32)
    options = LossOptions("forward_kl" if divergence == "none" else divergence, alpha=0.4)
    weights = torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0], device=DEVICE)
    labels[3] = -100
    keep = torch.tensor([1, 2, 4], device=DEVICE)
    head: tuple[Tensor, ...] = (student, teacher) if divergence != "none" else (student,)
    expected = softmax_kl(*(t[keep] for t in head), labels=labels[keep], token_weights=weights[keep], options=options)
    (wanted,) = torch.autograd.grad(expected.loss, student)
    with torch.no_grad():
        for tensor in head:
            tensor[[0, 3]] = math.nan
    result = softmax_kl(*head, labels=labels, token_weights=weights, options=options)
    (gradient,) = torch.autograd.grad(result.loss, student)
    assert relative(gradient, wanted) < 1e-6
    for value, want in zip(result[:4], expected[:4], strict=True):
        assert relative(value, want) < 1e-6


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_counted(form: str, n: int) -> None:
    case = moved(make_case(n, ignored=n))
    result = case.loss(form, LossOptions(alpha=0.5, z_loss=0.1), labels=case.labels)
    result.loss.backward()
    assert [x.item() for x in result[:4]] == [0, 0, 0, 0]
    for leaf in case.student:
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_correct_takes_the_lowest_index_on_ties() -> None:
    logits = torch.zeros(3, 5000, device=DEVICE)
    logits[1, 3000], logits[1, 4000] = 1.0, 1.0
    logits[2, 4500], logits[2, 2500] = 1.0, 1.0
    labels = torch.tensor([0, 3000, 4500], device=DEVICE)
    assert softmax_kl(logits, labels=labels).correct.item() == 2


def test_strides_in_place_and_a_second_backward() -> None:
    student, teacher, labels = softmax_case(4, 90, 2.0, torch.float32)
    options = LossOptions("jsd", alpha=0.5)
    expected = torch.autograd.grad(softmax_kl(student, teacher, labels=labels, options=options).loss, student)[0]

    columns = student.detach().t().contiguous().t().requires_grad_()  # column major
    rows = torch.cat([teacher, teacher], 1)[:, :90]  # rows apart
    loss = softmax_kl(columns, rows, labels=labels, options=options).loss
    once = torch.autograd.grad(loss, columns, retain_graph=True)[0]
    twice = torch.autograd.grad(3 * loss, columns)[0]
    assert relative(once, expected) < 1e-6
    assert relative(twice, 3 * expected) < 1e-6

    leaf = student.detach().clone().requires_grad_()
    logits = leaf * 1.0
    loss = softmax_kl(logits, teacher, labels=labels, options=options, in_place=True).loss
    loss.backward(retain_graph=True)
    assert leaf.grad is not None
    assert relative(leaf.grad, expected) < 1e-6
    assert relative(logits.detach(), expected) < 1e-6
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("convention", "divergence"),
    [
        *(("tail", d) for d in DIVERGENCES),
        *(("renormalised", d) for d in DIVERGENCES if d != "reverse_kl"),
        ("support", "forward_kl"),
        ("sampled", "soft_cross_entropy"),
    ],
)
def test_sparse_teachers(convention: str, divergence: str) -> None:
    case = moved(make_case(6, 41, 8, 5))
    generator = torch.Generator().manual_seed(3)
    logprobs, ids = torch.log_softmax(case.teacher_logits(), 1).topk(7, 1)
    if convention == "sampled":
        ids = torch.randint(41, (6, 7), generator=generator).to(DEVICE)
        ids[:, 1] = ids[:, 4]
        logprobs = torch.full_like(logprobs, -math.log(7))
    for extras in EXTRAS[:4]:
        options = LossOptions(divergence, beta=0.3, chunk_bytes=2000, **extras)
        teacher: dict[str, Any] = {"teacher_ids": ids, "convention": convention}
        targets = {"labels": case.labels, "token_weights": case.token_weights}
        result = case.linear(teacher_logprobs=logprobs, **teacher, **targets, options=options)
        wide = moved(case, F64)
        logits = torch.nn.functional.linear(wide.hidden, wide.weight, wide.bias)
        targets = {"labels": case.labels, "token_weights": case.token_weights.double()}
        wanted = distillation_loss(logits, teacher_logprobs=logprobs.double(), **teacher, **targets, options=options)
        assert_reference(result, case.student, wanted, wide.student, 2e-5)


def test_recompute_gives_the_same_gradients() -> None:
    case = moved(make_case(6, 41, 8, 5))
    options = LossOptions("reverse_kl", alpha=0.3, chunk_bytes=2000)
    first = torch.autograd.grad(case.loss("hidden", options, labels=case.labels).loss, case.student)
    again = dataclasses.replace(options, recompute=True)
    second = torch.autograd.grad(case.loss("hidden", again, labels=case.labels).loss, case.student)
    for a, b in zip(first, second, strict=True):
        assert relative(a, b) < 1e-6


@triton.jit
def series_kernel(x, grown, logged, n: tl.constexpr):
    at = tl.arange(0, n)
    value = tl.load(x + at)
    tl.store(grown + at, expm1(value))
    tl.store(logged + at, log1p(value))


def test_series_of_expm1_and_log1p() -> None:
    sizes = torch.logspace(-30, 1.3, 512)
    x = torch.cat([sizes, -sizes.clamp(max=0.98)]).to(DEVICE)
    grown, logged = torch.empty_like(x), torch.empty_like(x)
    series_kernel[(1,)](x, grown, logged, x.numel())
    for value, exact in ((grown, torch.expm1(x.double())), (logged, torch.log1p(x.double()))):
        assert ((value.double() - exact) / exact).abs().max().item() < 1e-6
