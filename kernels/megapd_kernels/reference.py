"""The definition of the distillation losses, in plain torch over whole logits: every kernel equals this one.

With a = student logits / student_temperature, b = teacher logits / teacher_temperature, p = softmax(a), q = softmax(b):

    forward_kl          sum_j q_j (log q_j - log p_j)
    reverse_kl          sum_j p_j (log p_j - log q_j)
    jsd                 beta sum_j q_j log(q_j / m_j) + (1 - beta) sum_j p_j log(p_j / m_j),  m = beta q + (1 - beta) p
    tvd                 1/2 sum_j |p_j - q_j|
    soft_cross_entropy  - sum_j q_j log p_j

and the others of divergences/, each by its own formula.

A teacher given by few ids is the sum over them, or over buckets, that its convention names: see sparse.py.
0 log 0 = 0, so classes that both sides ban (logit -inf) count for nothing; a class banned by one side alone makes a KL
infinite where the other side gives it weight. A teacher at temperature 0, or given as ids, is one-hot.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .divergences import Divergence
from .divergences.base import LOG_ZERO, floored
from .inputs import flatten, unflatten
from .options import LossOptions, LossResult, TokenOutputs, known_names
from .sparse import Convention, SparseTeacher, check_ids
from .targets import Positions, Teacher, accumulation_dtype, check_logits, make_targets, reciprocal_or_zero


@known_names
def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    teacher_ids: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
    teacher_log_rest: Tensor | None = None,
    convention: Convention | None = None,
    labels: Tensor | None = None,
    token_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    denominator: Tensor | float | None = None,
    options: LossOptions | None = None,
) -> LossResult:
    """The loss by autograd, in float32 or, for float64 logits, float64.

    student_logits [N, V]; labels [N] int64; teacher_logits [N, V], or teacher_ids [N], or teacher_ids and teacher_logprobs
    [N, K] in a convention, or neither; token_weights [N].
    The arguments mean what they mean in `linear_distillation_loss`. Nothing but the student is differentiated.

    Raises ValueError for shapes and combinations that have no meaning.
    """
    options = LossOptions() if options is None else options
    given = Teacher(teacher_logits, ids=teacher_ids, logprobs=teacher_logprobs, log_rest=teacher_log_rest, convention=convention)
    positions = Positions(labels, token_weights, ignore_index, denominator, class_weights)
    student_logits, lead, given, positions = flatten(student_logits, given, positions)
    student_logits, teacher_logits = check_logits(student_logits, given.logits, options)
    dtype = accumulation_dtype(student_logits, teacher_logits)
    given = given._replace(logits=teacher_logits)
    targets = make_targets(student_logits, dtype, options, given, positions, classes=student_logits.shape[1])
    if targets.sparse is not None:
        check_ids(targets.sparse, targets.counted)
    # Positions that do not count are dropped, so that whatever they hold, NaN included, has no influence.
    keep = slice(None) if targets.counted is None else targets.counted
    student = _shaped(student_logits.to(dtype)[keep], options.logit_scale, options.soft_cap)
    weights = student.new_ones(student.shape[0]) if targets.weights is None else targets.weights[keep]

    cross_entropy = correct = student.new_zeros(student.shape[0])
    divergences = student.new_zeros(len(options.mixture.members), student.shape[0])
    loss = student.new_zeros(student.shape[0])
    has_teacher = teacher_logits is not None or targets.sparse is not None
    label_share = options.alpha if has_teacher else 1.0
    log_p_one = torch.log_softmax(student, -1)
    log_p = torch.log_softmax(student / options.student_temperature, -1) if has_teacher else log_p_one
    teacher: SparseTeacher | tuple[Tensor, Tensor] | None = None
    if targets.labels is not None:
        kept_labels = targets.labels[keep]
        cross_entropy = -log_p_one.gather(-1, kept_labels[:, None]).squeeze(-1)
        correct = (student.argmax(-1) == kept_labels).to(dtype)
    if targets.sparse is not None:
        teacher = targets.sparse if targets.counted is None else targets.sparse.select(targets.counted)
    elif teacher_logits is not None:
        teacher = _dense_teacher(teacher_logits.detach().to(dtype)[keep], student.detach(), options)
    if teacher is not None:
        divergences = torch.stack([_divergence(member, log_p, teacher) for _, member in options.mixture.members])
    divergence = options.mixture.total(divergences)
    # A share of 0 drops its term: 0 * inf would be NaN.
    if label_share > 0:
        smooth = options.label_smoothing
        target = cross_entropy if smooth == 0 else (1.0 - smooth) * cross_entropy - smooth * log_p_one.mean(-1)
        if targets.label_weights is not None:
            target = target * targets.label_weights[keep]
        loss = loss + label_share * target
    if label_share < 1:
        loss = loss + (1.0 - label_share) * options.t2 * divergence
    if options.z_loss > 0:
        loss = loss + options.z_loss * torch.logsumexp(student, -1).square()
    loss = weights * loss
    if options.reduction == "none":
        total = student.new_zeros(student_logits.shape[0]).masked_scatter(_mask(targets.counted, student_logits), loss)
    else:
        total = loss.sum()
    tokens = None
    if options.per_token:
        logits = None if teacher_logits is None else teacher_logits.detach()[keep]
        kept = _token_outputs(
            options, student.detach(), log_p.detach(), divergences.detach(), -cross_entropy.detach(), teacher, logits
        )
        tokens = TokenOutputs(*(_spread(value, _mask(targets.counted, student_logits)) for value in kept))
    result = LossResult(
        total * reciprocal_or_zero(targets.denominator),
        (weights * divergence.detach()).sum(),
        (weights * cross_entropy.detach()).sum(),
        (weights * correct).sum(),
        tokens,
    )
    return unflatten(result, lead)


def _mask(counted: Tensor | None, student: Tensor) -> Tensor:
    return torch.ones(student.shape[0], dtype=torch.bool, device=student.device) if counted is None else counted


def _spread(value: Tensor, counted: Tensor) -> Tensor:
    """[..., kept] -> [..., N], with what TokenOutputs says of positions that do not count."""
    out = value.new_full((*value.shape[:-1], len(counted)), -1 if value.dtype == torch.int64 else 0)
    out[..., counted] = value
    return out


def _shaped(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    """The logits that count; a banned class stays banned."""
    shaped = logits * scale
    if cap is not None:
        shaped = torch.where(logits == -torch.inf, -torch.inf, cap * torch.tanh(shaped / cap))
    return shaped


def _dense_teacher(logits: Tensor, student: Tensor, options: LossOptions) -> tuple[Tensor, Tensor] | SparseTeacher:
    """(q, log q) [N, V], or where the student's top k alone are compared the teacher there and in the rest."""
    logits = _shaped(logits, options.teacher_logit_scale, options.teacher_soft_cap)
    q, log_q = teacher_distribution(logits, options.teacher_temperature)
    if options.teacher_top_p is not None and options.teacher_temperature > 0:
        by_falling, order = q.sort(dim=-1, descending=True, stable=True)
        outside = by_falling.cumsum(-1) - by_falling >= options.teacher_top_p
        log_q = log_q.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf).log_softmax(-1)
        q = log_q.exp()
    if options.student_top_k is None:
        return q, log_q
    ids = student.topk(min(options.student_top_k, student.shape[-1]), -1).indices
    rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return SparseTeacher(ids, log_q.gather(-1, ids), rest, None, True, False)


def _divergence(member: Divergence, log_p: Tensor, teacher: SparseTeacher | tuple[Tensor, Tensor]) -> Tensor:
    if isinstance(teacher, SparseTeacher):
        return sparse_divergence(member, log_p, teacher)
    return divergence_of(member, log_p, teacher[1])


def _token_outputs(
    options: LossOptions,
    student: Tensor,
    log_p: Tensor,
    divergences: Tensor,
    label_logprob: Tensor,
    teacher: SparseTeacher | tuple[Tensor, Tensor] | None,
    teacher_logits: Tensor | None,
) -> tuple[Tensor, ...]:
    best, k = student.argmax(-1), options.top_k_agreement
    teacher_best, teacher_entropy, share = torch.full_like(best, -1), torch.zeros_like(log_p[:, 0]), torch.zeros_like(log_p[:, 0])
    if isinstance(teacher, SparseTeacher):
        log_q = teacher.log_q if teacher.first is None else teacher.log_q.masked_fill(~teacher.first, -torch.inf)
        teacher_best = teacher.ids.gather(1, log_q.argmax(1, keepdim=True)).squeeze(1)
        teacher_entropy = torch.special.entr(torch.cat([log_q, teacher.log_rest[:, None]], 1).exp()).sum(1)
        top = teacher.ids.gather(1, log_q.topk(min(k, log_q.shape[1]), 1).indices)
    elif teacher is not None:
        q, log_q = teacher
        teacher_best, teacher_entropy = log_q.argmax(-1), torch.special.entr(q).sum(-1)
    if teacher_logits is not None:
        top = teacher_logits.topk(min(k, teacher_logits.shape[1]), 1).indices
    if k > 0 and teacher is not None:
        ours = student.topk(min(k, student.shape[1]), 1).indices
        share = (top[:, :, None] == ours[:, None, :]).any(2).to(share.dtype).mean(1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    return (
        divergences,
        label_logprob,
        torch.logsumexp(student, -1),
        entropy,
        teacher_entropy,
        best,
        teacher_best,
        best == teacher_best,
        share,
    )


def teacher_distribution(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(q, log q) of logits [N, V] at a temperature; 0 is the one-hot limit, the lowest index on ties."""
    if temperature == 0.0:
        q = functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        return q, q.log()
    # Subtracting the maximum first keeps logits / 1e-20 from overflowing to inf - inf.
    log_q = torch.log_softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)
    return log_q.exp(), log_q


def divergence_of(member: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """[N] divergences of [N, V] distributions, student log p and teacher log q; differentiable in log p."""
    value = member.value(member.terms(log_p, log_q).sum(-1))
    return _at_least_zero(value) if member.nonnegative else value


def sparse_divergence(member: Divergence, log_p: Tensor, teacher: SparseTeacher) -> Tensor:
    """[N] divergences of the student's log p [N, V] from a teacher given by ids."""
    chosen = log_p.gather(-1, teacher.ids)
    q = teacher.log_q.exp()
    if not teacher.buckets:
        if teacher.first is not None:
            q = q * teacher.first
        surprise = -torch.where(q > 0, chosen, 0.0)
        if member.name == "soft_cross_entropy" or teacher.entropy_free:
            return (q * surprise).sum(-1)
        return (q * (floored(teacher.log_q) + surprise)).sum(-1)
    inside = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, teacher.ids, True)
    # Where all classes are inside or banned there is no rest; what stands for log 0 keeps NaN out of the gradient there.
    rest = torch.where(
        (inside | (log_p == -torch.inf)).all(-1), -torch.inf, torch.logsumexp(log_p.masked_fill(inside, LOG_ZERO), -1)
    )
    log_p = torch.cat([chosen, rest[:, None]], -1)
    return divergence_of(member, log_p, torch.cat([teacher.log_q, teacher.log_rest[:, None]], -1))


def _at_least_zero(x: Tensor) -> Tensor:
    """Rounding can take a divergence of near-equal distributions below 0; the value is lifted, the gradient is not touched."""
    return torch.where(x < 0, x - x.detach(), x)
