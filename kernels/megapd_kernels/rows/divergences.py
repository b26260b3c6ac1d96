"""The divergences and their gradients in plain torch, over buffers that they overwrite.

With p, q the softmax of the student's and the teacher's scaled logits, d = log p - log q, dD/da for a = S / temperature is

    forward_kl, soft_cross_entropy   p - q
    reverse_kl                       p (d - D)
    jsd                              (1 - beta) p (v - sum p v),   v = log(p / m) = -log1p(beta expm1(-d))
    tvd                              1/2 p (s - sum p s),          s = sign(p - q)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..sparse import SparseTeacher

# Beyond this |log p - log q|, the smaller of the two probabilities is below 1e-34 of the larger: no sum of either type sees it,
# while expm1 of more than 88 would overflow float32.
MAX_LOG_RATIO = 80.0

Total = Callable[[Tensor], Tensor]
Three = tuple[Tensor, Tensor, Tensor]


def local_total(x: Tensor) -> Tensor:
    """The sum over classes where one process holds them all; a vocabulary shard adds the other ranks' parts."""
    return x


# Each takes log p, log q [C, V], further buffers, all of which it may overwrite, beta, and the sum over ranks, and returns D [C],
# dD/da [C, V] and p [C, V]. A zero probability silences its term by a mask: its log ratio may be inf or, where both sides are 0,
# NaN. A NaN logit makes the whole row of p or q NaN, which no mask hides; JSD and TVD, whose gradients leave q out, add 0 * D to
# keep the NaN.


def _forward_kl(log_p: Tensor, log_q: Tensor, free: list[Tensor], beta: float, total: Total) -> Three:
    q = torch.exp(log_q, out=free[0])
    terms = log_q.sub_(log_p).mul_(q).masked_fill_(q == 0, 0.0)
    value = total(terms.sum(1)).clamp_(min=0.0)
    p = log_p.exp_()
    return value, torch.sub(p, q, out=log_q), p


def _soft_cross_entropy(log_p: Tensor, log_q: Tensor, free: list[Tensor], beta: float, total: Total) -> Three:
    q = log_q.exp_()
    terms = torch.mul(log_p, q, out=free[0]).masked_fill_(q == 0, 0.0)
    value = total(terms.sum(1)).neg_()
    p = log_p.exp_()
    return value, torch.sub(p, q, out=free[0]), p


def _reverse_kl(log_p: Tensor, log_q: Tensor, free: list[Tensor], beta: float, total: Total) -> Three:
    p = torch.exp(log_p, out=free[0])
    ratio = torch.sub(log_p, log_q, out=log_q).masked_fill_(p == 0, 0.0)
    value = total(torch.mul(p, ratio, out=log_p).sum(1))
    return value.clamp(min=0.0), ratio.sub_(value[:, None]).mul_(p), p


def _jsd(log_p: Tensor, log_q: Tensor, free: list[Tensor], beta: float, total: Total) -> Three:
    """Through the log ratio and log1p(expm1): for p near q, log(p / m) taken as a difference keeps no correct digit."""
    ratio = torch.sub(log_p, log_q, out=free[0])
    ratio.nan_to_num_(nan=0.0, posinf=MAX_LOG_RATIO, neginf=-MAX_LOG_RATIO).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    p, q = log_p.exp_(), log_q.exp_()
    # m / q >= beta, but for beta < 6e-8 float32 rounds 1 - beta to 1, and log1p(-1) is -inf; the same for m / p >= 1 - beta.
    m_over_q = torch.expm1(ratio, out=free[1]).mul_(1.0 - beta).log1p_().clamp_(min=math.log(beta))
    teacher_part = q.mul_(m_over_q).sum(1)
    m_over_p = ratio.neg_().expm1_().mul_(beta).log1p_().clamp_(min=math.log1p(-beta))
    student_part = torch.mul(m_over_p, p, out=q).sum(1)
    teacher_part, student_part = total(torch.stack([teacher_part, student_part])).unbind()
    value = (beta * teacher_part + (1.0 - beta) * student_part).neg_().clamp_(min=0.0)
    return value, m_over_p.sub_((student_part + 0.0 * value)[:, None]).mul_(p).mul_(beta - 1.0), p


def _tvd(log_p: Tensor, log_q: Tensor, free: list[Tensor], beta: float, total: Total) -> Three:
    p, q = log_p.exp_(), log_q.exp_()
    difference = torch.sub(p, q, out=free[0])
    value = torch.abs(difference, out=q).sum(1)
    sign = difference.sign_()
    value, mean = total(torch.stack([value, torch.mul(p, sign, out=q).sum(1)])).unbind()
    value = value * 0.5
    return value, sign.sub_((mean + 0.0 * value)[:, None]).mul_(p).mul_(0.5), p


DENSE: dict[str, Callable[[Tensor, Tensor, list[Tensor], float, Total], Three]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "tvd": _tvd,
    "soft_cross_entropy": _soft_cross_entropy,
}


def sparse_divergence(kind: str, log_p: Tensor, log_rest: Tensor, teacher: SparseTeacher, beta: float) -> Three:
    """(D [C], dD/da [C, K] at the ids, the rest's [C]: times p_j / P it is dD/da_j of a class j outside); see ../sparse.py.

    log_p [C, K] of the student at the ids, log_rest [C] of its mass outside.
    """
    if teacher.buckets:
        log_p = torch.cat([log_p, log_rest[:, None]], 1)
        log_q = torch.cat([teacher.log_q, teacher.log_rest[:, None]], 1)
        free = [torch.empty_like(log_p) for _ in range(2)]
        value, g, _ = DENSE[kind](log_p, log_q, free, beta, local_total)
        return value, g[:, :-1], g[:, -1]
    q = teacher.log_q.exp()
    once = q if teacher.first is None else q * teacher.first
    terms = -log_p if kind == "soft_cross_entropy" or teacher.entropy_free else teacher.log_q - log_p
    value = (once * terms).masked_fill(once == 0, 0.0).sum(1)
    mass = once.sum(1)
    return value, mass[:, None] * log_p.exp() - q, mass * log_rest.exp()
