"""Numbers at the edges of the API, and what must be refused rather than computed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megapd_kernels import (
    JSD,
    ForwardKL,
    LossOptions,
    distillation_loss,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_sparse_kl,
    softmax_kl,
)

from .cases import F64, SPARSE, below, interpreter, make_case, relative


def confident(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(log probabilities and ids [4, 3] of a teacher whose rest is 1e-9 to 1e-6 of the mass, the exact log of the rest)."""
    rest = torch.tensor([1e-9, 1e-8, 1e-7, 1e-6], dtype=F64)
    shares = torch.tensor([0.9999, 0.0001 - 1e-5, 1e-5], dtype=F64)
    logprobs = (shares * (1 - rest[:, None])).log()
    return logprobs.to(dtype), torch.tensor([[1, 2, 3]]).expand(4, 3).contiguous(), rest.log()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "alpha_beta"])
def test_the_rest_of_a_confident_token_has_a_floor(divergence: str, dtype: torch.dtype) -> None:
    """1 - sum is 0 or rounding there: no infinity, no NaN, and a loss within what the rounding leaves open."""
    case = make_case(4).to(torch.float32)
    logprobs, ids, log_rest = confident(dtype)
    options = LossOptions(divergence)
    result = linear_sparse_kl(case.hidden, case.weight, ids, logprobs, bias=case.bias, convention="tail", options=options)
    gradients = torch.autograd.grad(result.loss, case.student)
    assert result.loss.isfinite()
    assert all(g.isfinite().all() for g in gradients)
    exact, _, _ = confident(F64)
    given = {"bias": case.bias, "convention": "tail", "teacher_log_rest": log_rest.float()}
    known = linear_sparse_kl(case.hidden, case.weight, ids, exact.float(), **given, options=options)
    # log of the rest's mass is off by at most log(floor / 1e-9): the floor is 2^-23, for bf16 2^-9 |log q| more.
    assert (result.loss - known.loss).abs() < math.log(1e-2 / 1e-9)
    assert (result.loss - known.loss).abs() < 0.5 * known.loss


def test_float64_log_probabilities_keep_the_losses_type() -> None:
    case = make_case().to(torch.float32)
    for convention in SPARSE:
        teacher = case.sparse(convention)
        wide = {**teacher, "teacher_logprobs": teacher["teacher_logprobs"].double()}
        divergence = "forward_kl"
        result = case.linear(**wide, options=LossOptions(divergence))
        assert result.loss.dtype == torch.float32
        assert relative(result.loss, case.linear(**teacher, options=LossOptions(divergence)).loss) < 1e-6
    # 1 - sum is formed in float64: float32 would leave two digits of 1e-5.
    hidden = torch.zeros(1, 2)
    q = torch.tensor([[0.6, 0.4 - 1e-5]], dtype=F64)
    ids = torch.tensor([[0, 1]])
    result = linear_sparse_kl(hidden, torch.zeros(10, 2), ids, q.log(), convention="tail")
    wanted = (q * (q / 0.1).log()).sum() + 1e-5 * math.log(1e-5 / 0.8)
    assert result.loss.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("beta", [1e-6, 1e-4, 0.01, 0.99, 1 - 1e-4, 1 - 1e-6])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
@interpreter
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_jsd_keeps_its_digits_near_its_ends(beta: float, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAPD_KERNELS", implementation)
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(4, 50), 3 * torch.randn(4, 50)
    student.requires_grad_()
    result = softmax_kl(student, teacher, options=LossOptions(JSD(beta)))
    wide = student.detach().double().requires_grad_()
    wanted = distillation_loss(wide, teacher.double(), options=LossOptions(JSD(beta)))
    (gradient,), (expected,) = torch.autograd.grad(result.loss, student), torch.autograd.grad(wanted.loss, wide)
    assert relative(gradient, expected) < 2e-5
    assert relative(result.loss, wanted.loss) < 1e-4


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("linear", [True, False])
def test_a_second_derivative_is_refused(linear: bool, recompute: bool) -> None:
    case = make_case()
    if linear:
        leaf, result = case.hidden, case.loss("hidden", LossOptions(recompute=recompute))
    else:
        leaf = F.linear(case.hidden, case.weight).detach().requires_grad_()
        result = softmax_kl(leaf, case.teacher_logits())
    (plain,) = torch.autograd.grad(result.loss, leaf, retain_graph=True)
    (gradient,) = torch.autograd.grad(result.loss, leaf, create_graph=True)
    assert torch.equal(plain, gradient.detach())
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


def test_a_forward_mode_derivative_is_refused() -> None:
    case = make_case()
    hidden, tangent = case.hidden.detach(), torch.ones_like(case.hidden)

    def loss(x: Tensor) -> Tensor:
        return linear_cross_entropy(x, case.weight.detach(), case.labels).loss

    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(loss, (hidden,), (tangent,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        loss(torch.autograd.forward_ad.make_dual(hidden, tangent))  # type: ignore[no-untyped-call]
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        softmax_kl(torch.autograd.forward_ad.make_dual(hidden, tangent), hidden)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("convention", ["tail", "renormalised", "support"])
def test_an_id_given_twice_is_refused(convention: Any) -> None:
    case = make_case()
    teacher = {**case.sparse(convention), "labels": case.labels}
    ids = teacher["teacher_ids"].clone()
    ids[7, 3] = ids[7, 1]
    logits = F.linear(case.hidden, case.weight)
    for call in (case.linear, lambda **named: distillation_loss(logits, **named)):
        with pytest.raises(ValueError, match=r"^teacher_ids: a position has an id twice"):
            call(**{**teacher, "teacher_ids": ids})
    ids = teacher["teacher_ids"].clone()
    ids[1, 3] = ids[1, 1]  # its label is ignored
    assert torch.equal(case.linear(**{**teacher, "teacher_ids": ids}).loss, case.linear(**teacher).loss)


@pytest.mark.parametrize("convention", ["renormalised", "support", "sampled"])
def test_a_teacher_without_mass_is_refused(convention: Any) -> None:
    case = make_case()
    teacher = case.sparse(convention)
    logprobs = teacher["teacher_logprobs"].clone()
    logprobs[5] = -torch.inf
    with pytest.raises(ValueError, match=r"^teacher_logprobs: a position gives no class any mass; weigh it with 0"):
        case.linear(**{**teacher, "teacher_logprobs": logprobs})
    mask = torch.arange(13) != 5
    assert case.linear(**{**teacher, "teacher_logprobs": logprobs}, token_weights=mask).loss.isfinite()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("form", ["logits", "hidden", "tail"])
def test_teachers_from_inference_mode(form: str, recompute: bool) -> None:
    case = make_case()
    with torch.inference_mode():
        teacher = {n: t.clone() if isinstance(t, Tensor) else t for n, t in case.teacher(form).items()}
    assert any(isinstance(t, Tensor) and t.is_inference() for t in teacher.values())
    for reduction in ("mean", "none"):
        options = LossOptions(recompute=recompute, reduction=reduction)  # type: ignore[arg-type]
        result, wanted = case.linear(**teacher, options=options), case.loss(form, options)
        for value, want in zip(
            torch.autograd.grad(result.loss.sum(), case.student),
            torch.autograd.grad(wanted.loss.sum(), case.student),
            strict=True,
        ):
            assert torch.equal(value, want)
    if form == "logits":
        logits = F.linear(case.hidden, case.weight).detach().requires_grad_()
        softmax_kl(logits, teacher["teacher_logits"]).loss.backward()
        assert logits.grad is not None


READ = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", READ)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "lk"])
def test_a_teachers_logits_are_read_in_their_type(divergence: str, dtype: torch.dtype) -> None:
    case = make_case().to(torch.float32)
    logits = case.teacher_logits().to(dtype)
    options = LossOptions(divergence)
    result = case.linear(teacher_logits=logits, options=options)
    wanted = case.linear(teacher_logits=logits.float(), options=options)
    assert result.loss.dtype == torch.float32
    assert torch.equal(result.loss, wanted.loss)
    student = F.linear(case.hidden, case.weight)
    assert torch.equal(
        softmax_kl(student, logits, options=options).loss, softmax_kl(student, logits.float(), options=options).loss
    )


@pytest.mark.slow
@interpreter
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
def test_triton_reads_a_teachers_logits_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 in, and no float32 of their size: neither the chunk's nor a mask over it."""
    from megapd_kernels.rows.triton import TritonRows

    monkeypatch.setenv("MEGAPD_KERNELS", "triton")
    case = make_case(8, 64, 4, 4).to(torch.float32)
    logits, options = case.teacher_logits().bfloat16(), LossOptions(alpha=0.2)
    _, _, _, problem = below(lambda: case.linear(teacher_logits=logits, labels=case.labels, options=options))
    rows = TritonRows(problem, 8, 64, torch.device("cpu"), grad=True, gradient_dtype=torch.float32)
    assert rows.teacher(2, 5).data_ptr() == logits[2].data_ptr()
    assert rows.bytes_per_row() == 64 * (4 + 4)
    result = case.linear(teacher_logits=logits, labels=case.labels, options=options)
    wide = case.linear(teacher_logits=logits.float(), labels=case.labels, options=options)
    assert torch.equal(result.loss, wide.loss)


@pytest.mark.slow
@interpreter
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("form", ["logits", "tail"])
def test_float16_gradients_keep_small_probabilities(form: str) -> None:
    """Chunks' gradients in float16, as for products of that type: 4,000 classes of 2.5e-4, the smallest far below 6e-5."""
    from megapd_kernels.rows.triton import TritonRows

    torch.manual_seed(0)
    case = make_case(4, 2000, 4, 4).to(torch.float32)
    weights = 1e-3 * torch.rand(4)
    _, _, _, problem = below(lambda: case.linear(**case.teacher(form), token_weights=weights))
    student = F.linear(case.hidden, case.weight, case.bias).detach()

    def gradient(dtype: torch.dtype) -> tuple[Tensor, TritonRows]:
        rows = TritonRows(problem, 4, 2000, torch.device("cpu"), grad=True, gradient_dtype=dtype)
        rows.student(0, 4).copy_(student)
        found = rows(0, 4)
        assert found is not None
        return found.double(), rows

    exact, wide = gradient(torch.float32)
    half, rows = gradient(torch.float16)
    assert wide.gradient_scale is None
    assert rows.gradient_scale is not None
    assert math.log2(rows.gradient_scale.item()).is_integer()
    assert half.isfinite().all()
    assert relative(half / rows.gradient_scale, exact) < 5e-4
    assert relative(exact.half().double(), exact) > 5e-3  # unscaled


def test_product_dtype_is_what_autocast_says() -> None:
    case = make_case().to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, _, _, problem = below(lambda: case.loss("hidden", LossOptions()))
        _, _, _, asked = below(lambda: case.loss("hidden", LossOptions(product_dtype=torch.float16)))
        wide = make_case()
        _, _, _, double = below(lambda: wide.loss("hidden", LossOptions()))
    assert problem.product_dtype == torch.bfloat16
    assert asked.product_dtype == torch.float16
    assert double.product_dtype is None
    _, _, _, without = below(lambda: case.loss("hidden", LossOptions()))
    assert without.product_dtype is None


def test_another_temperature_or_denominator_compiles_nothing_again() -> None:
    case = make_case().to(torch.float32)
    student, teacher = [t.detach() for t in case.student], case.teacher_logits()
    compiled = 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    def loss(hidden: Tensor, denominator: float, options: LossOptions) -> Tensor:
        arguments: dict[str, Any] = {"bias": student[2], "teacher_logits": teacher, "labels": case.labels}
        return linear_distillation_loss(hidden, student[1], **arguments, denominator=denominator, options=options).loss

    torch._dynamo.reset()
    fast = torch.compile(loss, backend=backend, fullgraph=True)
    for step in range(1, 7):
        options = LossOptions(0.7 * ForwardKL() + step * JSD(0.1 * step), student_temperature=1 + step / 7, soft_cap=5.0 * step)
        assert relative(fast(student[0], 3.5 * step, options), loss(student[0], 3.5 * step, options)) < 1e-6
    assert compiled <= 2  # a float is a number of its own once it has changed
