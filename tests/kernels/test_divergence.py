"""A divergence added from outside, as kernels/README.md says: known by name, compiled, sharded, in torch and in Triton."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megapd_kernels import Divergence, ForwardKL, LossOptions, distillation_loss, linear_distillation_loss, softmax_kl
from megapd_kernels.divergences import NAMES, Mixture, register
from megapd_kernels.divergences.base import Element

from .cases import F64, assert_equal_losses, interpreter, make_case, relative

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def chi_square_element(log_p, log_q, p, q, x, y, z):  # type: ignore[no-untyped-def]
    ratio = tl.where(q == 0, 0.0, p / q)
    return x * (ratio * p - p), x * 2.0 * ratio * p


@register
@dataclass(frozen=True)
class ChiSquare(Divergence):
    """factor * sum_j (p_j - q_j)^2 / q_j = factor * (sum_j p_j^2 / q_j - 1); u = 2 factor p^2 / q."""

    factor: float = 1.0

    name = "chi_square"
    needs_rest = "is infinite where the teacher has no mass"

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return self.factor * ((2.0 * log_p - log_q).exp() - log_p.exp())

    def slopes(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return 2.0 * self.factor * (2.0 * log_p - log_q).exp()

    def element(self) -> Element:
        return Element(chi_square_element)


@register
@dataclass(frozen=True)
class SquaredHellinger(Divergence):
    """1 - sum_j sqrt(p_j q_j): a value of the sum, and no Triton of its own."""

    name = "squared_hellinger"

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (0.5 * (log_p + log_q)).exp()

    def slopes(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return 0.5 * (0.5 * (log_p + log_q)).exp()

    def value(self, total: Tensor) -> Tensor:
        return 1.0 - total

    def value_slope(self, total: Tensor) -> Tensor:
        return -torch.ones_like(total)


@pytest.mark.parametrize("form", ["logits", "hidden", "tail"])
@pytest.mark.parametrize("divergence", ["chi_square", "squared_hellinger", 0.3 * ChiSquare(0.2) + ForwardKL()])
def test_from_outside_it_equals_its_formula(divergence: str | Mixture, form: str) -> None:
    case = make_case()
    options = LossOptions(divergence, student_temperature=2.0, alpha=0.2, per_token=True)
    assert_equal_losses(case, form, options, -3.0, 1e-11, labels=case.labels)


@interpreter
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("divergence", ["chi_square", "squared_hellinger", 0.3 * ChiSquare(0.2) + ForwardKL()])
def test_in_triton(divergence: str | Mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One without Triton is computed by torch beside kernels that have it."""
    monkeypatch.setenv("MEGAPD_KERNELS", "triton")
    student = torch.randn(4, 37).requires_grad_()
    wide, teacher = student.detach().double().requires_grad_(), torch.randn(4, 37)
    options = LossOptions(divergence)
    result, wanted = softmax_kl(student, teacher, options=options), distillation_loss(wide, teacher.double(), options=options)
    assert relative(result.loss, wanted.loss) < 1e-5
    assert relative(torch.autograd.grad(result.loss, student)[0], torch.autograd.grad(wanted.loss, wide)[0]) < 1e-5


@pytest.mark.slow
def test_compiled_by_name_and_parameters() -> None:
    case = make_case()

    def loss(hidden: Tensor, options: LossOptions) -> Tensor:
        weight, teacher = case.weight.detach(), case.teacher_logits()
        return linear_distillation_loss(hidden, weight, teacher_logits=teacher, options=options).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for factor in (0.5, 2.0):
        options = LossOptions(ChiSquare(factor))
        assert relative(compiled(case.hidden, options), loss(case.hidden, options)) < 1e-12


def test_what_it_cannot_do_is_refused_with_its_reason() -> None:
    case = make_case()
    with pytest.raises(ValueError, match=r"^convention: chi_square is infinite where the teacher has no mass; choose tail"):
        case.linear(**case.sparse("renormalised"), options=LossOptions("chi_square"))
    with pytest.raises(ValueError, match=r"^divergence: squared_hellinger has no meaning for the convention support"):
        case.linear(**case.sparse("support"), options=LossOptions("squared_hellinger"))
    with pytest.raises(ValueError, match=r"^divergence: 'jsd' is the name of JSD"):

        @register
        class Other(Divergence):
            name = "jsd"

    assert NAMES["jsd"].__name__ == "JSD"
    logits = F.linear(case.hidden, case.weight)
    assert logits.dtype == F64
