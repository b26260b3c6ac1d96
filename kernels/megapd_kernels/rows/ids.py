"""The algebra of a few ids of a row against the classes outside them; see ../sparse.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..divergences import Mixture
from ..sparse import SparseTeacher


class Picked(NamedTuple):
    """A row's ids against the classes outside them: everything [C] or [C, K], of all ranks.

    maximum, log_sum, log_sum_one  M, L_T, L_1 over all classes
    log_p [C, K]                   log p_T at the ids
    p_one [C, K]                   softmax at temperature 1 there
    log_rest, log_rest_one         log of the mass outside the ids, at T and at 1
    """

    maximum: Tensor
    log_sum: Tensor
    log_sum_one: Tensor
    log_p: Tensor
    p_one: Tensor
    log_rest: Tensor
    log_rest_one: Tensor

    def entropy(self, outside: Tensor, first: Tensor | None) -> Tensor:
        """[C] of the whole softmax at T, from the entropy of the classes outside among themselves."""
        p, rest = self.log_p.exp(), self.log_rest.exp()
        at_ids = -(p * self.log_p.masked_fill(p == 0, 0.0))
        if first is not None:
            at_ids = at_ids * first
        return at_ids.sum(1) + torch.where(rest == 0, 0.0, rest * (outside - self.log_rest))


def sparse_divergence(mixture: Mixture, log_p: Tensor, log_rest: Tensor, teacher: SparseTeacher) -> tuple[Tensor, Tensor, Tensor]:
    """(D [M, C] of each divergence; the sum's dD/da [C, K] at the ids; the rest's [C]: times p_j / P it is dD/da_j of a class j
    outside).

    log_p [C, K] of the student at the ids, log_rest [C] of its mass outside.
    """
    if teacher.buckets:
        log_p = torch.cat([log_p, log_rest[:, None]], 1)
        log_q = torch.cat([teacher.log_q, teacher.log_rest[:, None]], 1)
        free = [torch.empty_like(log_p) for _ in range(mixture.scratch)]
        values, g, _ = mixture.rows(log_p, log_q, free, lambda x: x)
        return values, g[:, :-1], g[:, -1]
    q = teacher.log_q.exp()
    once = q if teacher.first is None else q * teacher.first
    each: list[Tensor] = []
    for _, member in mixture.members:
        with_entropy = member.name == "forward_kl" and not teacher.entropy_free
        terms = teacher.log_q - log_p if with_entropy else -log_p
        each.append((once * terms).masked_fill(once == 0, 0.0).sum(1))
    mass = once.sum(1)
    weight = sum(weight for weight, _ in mixture.members)
    return torch.stack(each), weight * (mass[:, None] * log_p.exp() - q), weight * mass * log_rest.exp()


def best_of(maximum: Tensor, column: Tensor, picks: Tensor, ids: Tensor) -> Tensor:
    """The class [C] of the largest logit, the lowest on ties: of `column`, logit `maximum` [C], and ids, logits picks [C, K]."""
    top = picks.amax(1)
    last = torch.iinfo(torch.int64).max
    first = ids.masked_fill(picks != top[:, None], last).amin(1)
    return torch.where((top > maximum) | ((top == maximum) & (first < column)), first, column)


def teacher_outputs(teacher: SparseTeacher) -> tuple[Tensor, Tensor]:
    """(the id of most mass, the lowest on ties; the entropy of the ids' and the rest's probabilities as given), [C]."""
    top = teacher.log_q.amax(1, keepdim=True)
    best = teacher.ids.masked_fill(teacher.log_q != top, torch.iinfo(torch.int64).max).amin(1)
    log_q = teacher.log_q if teacher.first is None else teacher.log_q.masked_fill(~teacher.first, -torch.inf)
    log_q = torch.cat([log_q, teacher.log_rest[:, None]], 1)
    q = log_q.exp()
    return best, -(q * log_q.masked_fill(q == 0, 0.0)).sum(1)


def student_top(student: Tensor, teacher: Tensor, k: int, temperature: float) -> SparseTeacher:
    """The teacher at the student's k largest logits and in the rest, of logits [C, V] of both."""
    ids = student.topk(min(k, student.shape[1]), 1).indices
    log_q = torch.log_softmax((teacher - teacher.amax(1, keepdim=True)) / temperature, 1)
    chosen = log_q.gather(1, ids)
    log_rest = torch.logsumexp(log_q.scatter_(1, ids, -torch.inf), 1)
    return SparseTeacher(ids, chosen, log_rest, None, True, False)


def nucleus_(logits: Tensor, shaped: Tensor, temperature: float, top_p: float) -> None:
    """Ban, in place, the classes of logits [C, V] outside the fewest whose softmax of `shaped` over temperature sums to top_p."""
    q, order = torch.softmax((shaped - shaped.amax(1, keepdim=True)) / temperature, 1).sort(dim=1, descending=True, stable=True)
    outside = q.cumsum(1) - q >= top_p
    logits.masked_fill_(torch.zeros_like(outside).scatter_(1, order, outside), -torch.inf)


def shape_(logits: Tensor, scale: float, cap: float | None, *, slope: bool) -> Tensor | None:
    """logits [C, V] -> scale * logits, capped as cap * tanh(. / cap), in place; a banned class stays banned. slope: also the
    derivative [C, V] of that, 0 there."""
    banned = logits == -torch.inf
    if scale != 1.0:
        logits.mul_(scale)
    if cap is not None:
        logits.div_(cap).tanh_()
    derivative = None
    if slope:
        derivative = torch.full_like(logits, scale)
        if cap is not None:
            derivative.addcmul_(logits, logits, value=-scale)
        derivative.masked_fill_(banned, 0.0)
    if cap is not None:
        logits.mul_(cap)
    logits.masked_fill_(banned, -torch.inf)
    return derivative


def overlap(student: Tensor, teacher: Tensor) -> Tensor:
    """[C], the share of the teacher's ids [C, k] that are among the student's [C, k]."""
    return (teacher[:, :, None] == student[:, None, :]).any(2).double().mean(1)
