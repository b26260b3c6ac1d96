"""The definition of the distillation losses, in plain torch over whole logits: every kernel equals this one.

With a = student logits / student_temperature, b = teacher logits / teacher_temperature, p = softmax(a), q = softmax(b):

    forward_kl          sum_j q_j (log q_j - log p_j)
    reverse_kl          sum_j p_j (log p_j - log q_j)
    jsd                 beta sum_j q_j log(q_j / m_j) + (1 - beta) sum_j p_j log(p_j / m_j),  m = beta q + (1 - beta) p
    tvd                 1/2 sum_j |p_j - q_j|
    soft_cross_entropy  - sum_j q_j log p_j

A teacher given by few ids is the sum over them, or over buckets, that its convention names: see sparse.py.
0 log 0 = 0, so classes that both sides ban (logit -inf) count for nothing; a class banned by one side alone makes a KL
infinite where the other side gives it weight. A teacher at temperature 0, or given as ids, is one-hot.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .options import (
    Divergence,
    LossOptions,
    LossResult,
    Positions,
    Teacher,
    accumulation_dtype,
    check_logits,
    known_names,
    make_targets,
    reciprocal_or_zero,
)
from .sparse import Convention, SparseTeacher

# Stands for log 0 where it is multiplied by a probability that is exactly 0: exp(-1e4) is 0 in float64.
_LOG_ZERO = -1e4


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
    student_logits, teacher_logits = check_logits(student_logits, teacher_logits, options)
    dtype = accumulation_dtype(student_logits, teacher_logits)
    given = Teacher(teacher_logits, ids=teacher_ids, logprobs=teacher_logprobs, log_rest=teacher_log_rest, convention=convention)
    positions = Positions(labels, token_weights, ignore_index, denominator)
    targets = make_targets(student_logits, dtype, options, given, positions, classes=student_logits.shape[1])
    # Positions that do not count are dropped, so that whatever they hold, NaN included, has no influence.
    keep = slice(None) if targets.counted is None else targets.counted
    student = student_logits.to(dtype)[keep]
    weights = student.new_ones(student.shape[0]) if targets.weights is None else targets.weights[keep]

    divergence = cross_entropy = correct = student.new_zeros(student.shape[0])
    loss = student.new_zeros(student.shape[0])
    has_teacher = teacher_logits is not None or targets.sparse is not None
    label_share = options.alpha if has_teacher else 1.0
    log_p_one = torch.log_softmax(student, -1)
    if targets.labels is not None:
        kept_labels = targets.labels[keep]
        cross_entropy = -log_p_one.gather(-1, kept_labels[:, None]).squeeze(-1)
        correct = (student.argmax(-1) == kept_labels).to(dtype)
    if has_teacher:
        log_p = torch.log_softmax(student / options.student_temperature, -1)
        if targets.sparse is not None:
            teacher = targets.sparse if targets.counted is None else targets.sparse.select(targets.counted)
            divergence = sparse_divergence(options.divergence, log_p, teacher, options.beta)
        else:
            assert teacher_logits is not None
            q, log_q = teacher_distribution(teacher_logits.detach().to(dtype)[keep], options.teacher_temperature)
            divergence = divergence_of(options.divergence, log_p, q, log_q, options.beta)
    # A share of 0 drops its term: 0 * inf would be NaN.
    if label_share > 0:
        smooth = options.label_smoothing
        target = cross_entropy if smooth == 0 else (1.0 - smooth) * cross_entropy - smooth * log_p_one.mean(-1)
        loss = loss + label_share * target
    if label_share < 1:
        loss = loss + (1.0 - label_share) * options.t2 * divergence
    if options.z_loss > 0:
        loss = loss + options.z_loss * torch.logsumexp(student, -1).square()
    total = (weights * loss).sum() * reciprocal_or_zero(targets.denominator)
    return LossResult(
        total, (weights * divergence.detach()).sum(), (weights * cross_entropy.detach()).sum(), (weights * correct).sum()
    )


def teacher_distribution(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(q, log q) of logits [N, V] at a temperature; 0 is the one-hot limit, the lowest index on ties."""
    if temperature == 0.0:
        q = functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        return q, q.log()
    # Subtracting the maximum first keeps logits / 1e-20 from overflowing to inf - inf.
    log_q = torch.log_softmax((logits - logits.amax(-1, keepdim=True)) / temperature, -1)
    return log_q.exp(), log_q


def divergence_of(kind: Divergence, log_p: Tensor, q: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """[N] divergences of [N, V] distributions, student log p and teacher q, log q; differentiable in log p.

    Each factor of a zero probability is made finite before the product, since a `where` after it stops NaN in the value
    and not in the gradient.
    """
    if kind in ("forward_kl", "soft_cross_entropy"):
        surprise = -torch.where(q > 0, log_p, 0.0)
        if kind == "soft_cross_entropy":
            return (q * surprise).sum(-1)
        return _at_least_zero((q * (_floored(log_q) + surprise)).sum(-1))
    p = log_p.exp()
    if kind == "tvd":
        return 0.5 * (p - q).abs().sum(-1)
    if kind == "reverse_kl":
        return _at_least_zero((p * (_floored(log_p) - torch.where(p > 0, log_q, 0.0))).sum(-1))
    assert kind == "jsd"
    log_p, log_q = _floored(log_p), _floored(log_q)
    log_m = torch.logaddexp(log_q + _log(beta, q), log_p + _log(1.0 - beta, q))
    return _at_least_zero((beta * q * (log_q - log_m) + (1.0 - beta) * p * (log_p - log_m)).sum(-1))


def sparse_divergence(kind: Divergence, log_p: Tensor, teacher: SparseTeacher, beta: float) -> Tensor:
    """[N] divergences of the student's log p [N, V] from a teacher given by ids."""
    chosen = log_p.gather(-1, teacher.ids)
    q = teacher.log_q.exp()
    if not teacher.buckets:
        if teacher.first is not None:
            q = q * teacher.first
        surprise = -torch.where(q > 0, chosen, 0.0)
        if kind == "soft_cross_entropy" or teacher.entropy_free:
            return (q * surprise).sum(-1)
        return (q * (_floored(teacher.log_q) + surprise)).sum(-1)
    inside = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, teacher.ids, True)
    # Where all classes are inside or banned there is no rest; what stands for log 0 keeps NaN out of the gradient there.
    rest = torch.where(
        (inside | (log_p == -torch.inf)).all(-1), -torch.inf, torch.logsumexp(log_p.masked_fill(inside, _LOG_ZERO), -1)
    )
    log_p = torch.cat([chosen, rest[:, None]], -1)
    log_q = torch.cat([teacher.log_q, teacher.log_rest[:, None]], -1)
    return divergence_of(kind, log_p, log_q.exp(), log_q, beta)


def _floored(log_p: Tensor) -> Tensor:
    return log_p.masked_fill(log_p == -torch.inf, _LOG_ZERO)


def _log(x: float, like: Tensor) -> Tensor:
    return torch.tensor(x, dtype=like.dtype, device=like.device).log()


def _at_least_zero(x: Tensor) -> Tensor:
    """Rounding can take a divergence of near-equal distributions below 0; the value is lifted, the gradient is not touched."""
    return torch.where(x < 0, x - x.detach(), x)
