"""The Kullback-Leibler divergences, plain and against a mixture of both sides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import MAX_LOG_RATIO, Divergence, Element, Three, Total, floored, log_of, register


@register
@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(teacher || student) = sum_j q_j (log q_j - log p_j); u = -q."""

    name = "forward_kl"
    from_support = True

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        q = log_q.exp()
        return q * (floored(log_q) - torch.where(q > 0, log_p, 0.0))

    def slopes(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return -q

    def rows(self, log_p: Tensor, log_q: Tensor, free: list[Tensor], total: Total) -> Three:
        q = torch.exp(log_q, out=free[0])
        terms = log_q.sub_(log_p).mul_(q).masked_fill_(q == 0, 0.0)
        value = total(terms.sum(1)).clamp_(min=0.0)
        p = log_p.exp_()
        return value, torch.sub(p, q, out=log_q), p

    def element(self) -> Element:
        from .triton import forward_kl

        return Element(forward_kl, online=1)


@register
@dataclass(frozen=True)
class SoftCrossEntropy(Divergence):
    """- sum_j q_j log p_j: the forward KL plus the teacher's entropy, which changes no gradient."""

    name = "soft_cross_entropy"
    from_support = True
    nonnegative = False

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        q = log_q.exp()
        return q * -torch.where(q > 0, log_p, 0.0)

    def slopes(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return -q

    def rows(self, log_p: Tensor, log_q: Tensor, free: list[Tensor], total: Total) -> Three:
        q = log_q.exp_()
        terms = torch.mul(log_p, q, out=free[0]).masked_fill_(q == 0, 0.0)
        value = total(terms.sum(1)).neg_()
        p = log_p.exp_()
        return value, torch.sub(p, q, out=free[0]), p

    def element(self) -> Element:
        from .triton import soft_cross_entropy

        return Element(soft_cross_entropy, online=2)


@register
@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(student || teacher) = sum_j p_j (log p_j - log q_j); u = p (log p - log q)."""

    name = "reverse_kl"
    needs_rest = "is infinite where the teacher has no mass"

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        p = log_p.exp()
        return p * (floored(log_p) - torch.where(p > 0, log_q, 0.0))

    def slopes(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return p * (log_p - log_q).masked_fill_(p == 0, 0.0)

    def rows(self, log_p: Tensor, log_q: Tensor, free: list[Tensor], total: Total) -> Three:
        p = torch.exp(log_p, out=free[0])
        ratio = torch.sub(log_p, log_q, out=log_q).masked_fill_(p == 0, 0.0)
        value = total(torch.mul(p, ratio, out=log_p).sum(1))
        return value.clamp(min=0.0), ratio.sub_(value[:, None]).mul_(p), p

    def element(self) -> Element:
        from .triton import reverse_kl

        return Element(reverse_kl, online=3)


@register
@dataclass(frozen=True)
class SkewedForwardKL(Divergence):
    """KL(q || m), m = skew q + (1 - skew) p ("DistiLLM", arXiv 2402.03898): bounded by log(1 / skew). skew in (0, 1).

    With log(m / q) = log(skew + (1 - skew) p / q): u = (1 - skew) p (1 - q / m), from which (1 - skew) p cancels.
    """

    skew: float = 0.1

    name = "skewed_forward_kl"

    def __post_init__(self) -> None:
        check_inside("skew", self.skew)

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_p, log_q = floored(log_p), floored(log_q)
        log_m = torch.logaddexp(log_q + log_of(self.skew, log_q), log_p + math.log1p(-self.skew))
        return log_q.exp() * (log_q - log_m)

    def slopes(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
        log_m_over_q = log_share(-log_ratio(log_p, log_q), 1.0 - self.skew)
        return p * torch.expm1(-log_m_over_q).mul_(self.skew - 1.0)

    def element(self) -> Element:
        from .triton import skewed_forward_kl

        return Element(skewed_forward_kl)


@register
@dataclass(frozen=True)
class SkewedReverseKL(Divergence):
    """KL(p || m), m = skew p + (1 - skew) q ("DistiLLM", arXiv 2402.03898): bounded by log(1 / skew). skew in (0, 1).

    With v = log(p / m): u = p (v - skew (e^v - 1)).
    """

    skew: float = 0.1

    name = "skewed_reverse_kl"

    def __post_init__(self) -> None:
        check_inside("skew", self.skew)

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_p, log_q = floored(log_p), floored(log_q)
        log_m = torch.logaddexp(log_p + log_of(self.skew, log_p), log_q + math.log1p(-self.skew))
        return log_p.exp() * (log_p - log_m)

    def slopes(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
        v = -log_share(log_ratio(log_p, log_q), 1.0 - self.skew)
        return p * (v - self.skew * torch.expm1(v))

    def element(self) -> Element:
        from .triton import skewed_reverse_kl

        return Element(skewed_reverse_kl)


def check_inside(name: str, value: float) -> None:
    """Raise ValueError unless the parameter lies in (0, 1): the float32 kernels need both shares above 0."""
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name}: must lie strictly between 0 and 1, got {value}; for the ends choose a KL")


def log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """d = log p - log q within +-MAX_LOG_RATIO, 0 where both are banned."""
    d = log_p - log_q
    return d.nan_to_num_(nan=0.0, posinf=MAX_LOG_RATIO, neginf=-MAX_LOG_RATIO).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def log_share(d: Tensor, share: float) -> Tensor:
    """log((1 - share) + share e^-d): log1p keeps the digits near 0, the sum those of a share near 1 far from there."""
    small = torch.expm1(-d).mul_(share).log1p_()
    if share <= 0.5:
        return small
    return torch.where(d.abs() < 0.5, small, (-d).exp_().mul_(share).add_(1.0 - share).log_())
