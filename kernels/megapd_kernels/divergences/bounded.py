"""The Jensen-Shannon divergence, the total variation distance and the overlap of the two sides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Divergence, Element, Three, Total, floored, log_of, register
from .kl import check_inside, log_ratio, log_share

# Within, 1 - beta keeps its digits in a float32 logarithm of (1 - beta) + beta e^-d taken as log1p(beta expm1(-d)).
JSD_MIDDLE = (0.05, 0.95)


@register
@dataclass(frozen=True)
class JSD(Divergence):
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p. beta in (0, 1); it vanishes towards both ends.

    u = (1 - beta) p log(p / m).
    """

    beta: float = 0.5

    name = "jsd"
    scratch = 2

    def __post_init__(self) -> None:
        check_inside("beta", self.beta)

    @property
    def middle(self) -> bool:
        return JSD_MIDDLE[0] <= self.beta <= JSD_MIDDLE[1]

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_p, log_q, beta = floored(log_p), floored(log_q), self.beta
        log_m = torch.logaddexp(log_q + log_of(beta, log_q), log_p + math.log1p(-beta))
        return beta * log_q.exp() * (log_q - log_m) + (1.0 - beta) * log_p.exp() * (log_p - log_m)

    def slopes(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return log_share(log_ratio(log_p, log_q), self.beta).mul_(p).mul_(self.beta - 1.0)

    def rows(self, log_p: Tensor, log_q: Tensor, free: list[Tensor], total: Total) -> Three:
        """Through the log ratio and log1p(expm1): for p near q, log(p / m) taken as a difference keeps no correct digit."""
        beta, rest = self.beta, 1.0 - self.beta
        ratio = free[0].copy_(log_ratio(log_p, log_q))
        p, q = log_p.exp_(), log_q.exp_()
        if self.middle:
            m_over_q = torch.expm1(ratio, out=free[1]).mul_(rest).log1p_()
            teacher_part = q.mul_(m_over_q).sum(1)
            m_over_p = ratio.neg_().expm1_().mul_(beta).log1p_()
        else:
            teacher_part = q.mul_(log_share(-ratio, rest)).sum(1)
            m_over_p = ratio.copy_(log_share(ratio, beta))
        student_part = torch.mul(m_over_p, p, out=q).sum(1)
        teacher_part, student_part = total(torch.stack([teacher_part, student_part])).unbind()
        value = (beta * teacher_part + rest * student_part).neg_().clamp_(min=0.0)
        return value, m_over_p.sub_((student_part + 0.0 * value)[:, None]).mul_(p).mul_(-rest), p

    def element(self) -> Element:
        from .triton import jsd, jsd_ends

        return Element(jsd if self.middle else jsd_ends)


@register
@dataclass(frozen=True)
class TVD(Divergence):
    """1/2 sum_j |p_j - q_j|; u = 1/2 p sign(p - q)."""

    name = "tvd"

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return 0.5 * (log_p.exp() - log_q.exp()).abs()

    def slopes(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return 0.5 * p * torch.sign(p - q)

    def rows(self, log_p: Tensor, log_q: Tensor, free: list[Tensor], total: Total) -> Three:
        p, q = log_p.exp_(), log_q.exp_()
        difference = torch.sub(p, q, out=free[0])
        value = torch.abs(difference, out=q).sum(1)
        sign = difference.sign_()
        value, mean = total(torch.stack([value, torch.mul(p, sign, out=q).sum(1)])).unbind()
        value = value * 0.5
        return value, sign.sub_((mean + 0.0 * value)[:, None]).mul_(p).mul_(0.5), p

    def element(self) -> Element:
        from .triton import tvd

        return Element(tvd)


@register
@dataclass(frozen=True)
class LK(Divergence):
    """- log sum_j min(p_j, q_j), of the share of the teacher's draws that speculative decoding accepts from the student.

    The sum is 1 - TVD. u = 1/2 p (1 - sign(p - q)), from which 1/2 p cancels; value' = -1 / sum.
    """

    name = "lk"

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return torch.minimum(log_p, log_q).exp()

    def slopes(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return -0.5 * p * torch.sign(p - q)

    def value(self, total: Tensor) -> Tensor:
        return -total.log()

    def value_slope(self, total: Tensor) -> Tensor:
        return -1.0 / total

    def element(self) -> Element:
        from .triton import lk, minus_reciprocal

        return Element(lk, minus_reciprocal)
