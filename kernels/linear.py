"""Distillation losses in O(chunk) memory, in plain torch on any device.

For each chunk of C rows the logits S = X W^T + b (and the teacher's T) are formed in buffers that are allocated once, the
loss of the rows is read off, S is overwritten by G = d(sum_i w_i loss_i) / dS, and at once

    dX[chunk] = G W        dW += G^T X[chunk]        db += sum_rows G

so that backward only multiplies by the upstream gradient over the denominator, and no tensor of N x V exists. Nothing is
divided by the denominator before that: at fp16 the saved gradients keep a magnitude near 1.

With p, q the softmax of the student's and the teacher's scaled logits, d = log p - log q, dD/da for a = S / temperature is

    forward_kl, soft_cross_entropy   p - q
    reverse_kl                       p (d - D)
    jsd                              (1 - beta) p (v - sum p v),   v = log(p / m) = -log1p(beta expm1(-d))
    tvd                              1/2 p (s - sum p s),          s = sign(p - q)
    one-hot teacher at class k       c (p - onehot_k),  c = -p_k dD/dp_k: 1 for the KL, p_k for TVD, see _one_hot for JSD

Letters: N positions, C rows of a chunk, V classes, D student width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .options import LossOptions, LossResult, Targets, reciprocal_or_zero

TeacherForm = Literal["none", "ids", "dense"]

# Beyond this |log p - log q|, the smaller of the two probabilities is below 1e-34 of the larger: no sum of either type sees it,
# while expm1 of more than 88 would overflow float32.
_MAX_LOG_RATIO = 80.0


@dataclass(frozen=True)
class LinearProblem:
    """Checked arguments of linear_distillation_loss beyond the differentiable ones; every tensor is a constant."""

    targets: Targets
    teacher_logits: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    dtype: torch.dtype  # of sums, logits and accumulated gradients
    options: LossOptions

    @property
    def teacher(self) -> TeacherForm:
        if self.targets.ids is not None:
            return "ids"
        return "none" if self.teacher_logits is None and self.teacher_hidden is None else "dense"


def chunked_linear_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: LinearProblem) -> LossResult:
    """hidden [N, D], weight [V, D], bias [V] or None. See `linear_distillation_loss`."""
    return LossResult(*_LinearLoss.apply(hidden, weight, bias, problem, torch.is_grad_enabled()))


def chunked_logits_loss(logits: Tensor, problem: LinearProblem) -> LossResult:
    """logits [N, V]. See `softmax_kl`."""
    return LossResult(*_LogitsLoss.apply(logits, problem, torch.is_grad_enabled()))


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: LinearProblem, enabled: bool
    ) -> tuple[Tensor, ...]:
        need_x, need_w, need_b = (needed and enabled for needed in ctx.needs_input_grad[:3])
        n, v, dtype, device = hidden.shape[0], weight.shape[0], problem.dtype, hidden.device
        rows = _RowLoss(problem, n, v, device, grad=need_x or need_w or need_b)
        # The differentiable inputs are not kept: under ZeRO-3 the weight is there in forward only.
        dx = torch.empty(n, hidden.shape[1], dtype=dtype, device=device) if need_x else None
        dw = torch.zeros(v, weight.shape[1], dtype=dtype, device=device) if need_w else None
        db = torch.zeros(v, dtype=dtype, device=device) if need_b else None
        student = _Product(hidden, weight, bias, problem)
        teacher: _Product | None = None
        if problem.teacher_hidden is not None:
            assert problem.teacher_weight is not None
            teacher = _Product(problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias, problem)
        for start, stop in rows.chunks():
            x = student.logits(rows.student(start, stop), start, stop)
            if teacher is not None:
                teacher.logits(rows.teacher(start, stop), start, stop)
            elif problem.teacher_logits is not None:
                rows.copy_rows(rows.teacher(start, stop), problem.teacher_logits, start, stop)
            g = rows(start, stop)
            if g is None:
                continue
            if db is not None:
                db += g.sum(0)
            g = g.to(student.dtype)
            if dx is not None:
                _matmul(g, student.weight, out=dx[start:stop])
            if dw is not None:
                _matmul(g.t(), x, out=dw, add=True)
        return _finish(ctx, rows, problem, (hidden, weight, bias), (dx, dw, db))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled_gradients(ctx, upstream), None, None


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, problem: LinearProblem, enabled: bool) -> tuple[Tensor, ...]:
        grad = ctx.needs_input_grad[0] and enabled
        rows = _RowLoss(problem, logits.shape[0], logits.shape[1], logits.device, grad=grad)
        # In the logits' own type: here the gradient is N x V by nature.
        saved = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if grad else None
        for start, stop in rows.chunks():
            rows.copy_rows(rows.student(start, stop), logits, start, stop)
            if problem.teacher_logits is not None:
                rows.copy_rows(rows.teacher(start, stop), problem.teacher_logits, start, stop)
            g = rows(start, stop)
            if saved is not None and g is not None:
                saved[start:stop] = g
        return _finish(ctx, rows, problem, (logits,), (saved,))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled_gradients(ctx, upstream), None, None


def _finish(
    ctx: Any, rows: _RowLoss, problem: LinearProblem, inputs: tuple[Tensor | None, ...], gradients: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    reciprocal = reciprocal_or_zero(problem.targets.denominator)
    ctx.save_for_backward(reciprocal, *gradients)
    ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in inputs)
    ctx.set_materialize_grads(False)
    total, *sums = rows.sums()
    ctx.mark_non_differentiable(*sums)
    return total * reciprocal, *sums


def _scaled_gradients(ctx: Any, upstream: Tensor | None) -> list[Tensor | None]:
    """The saved gradients times upstream / denominator, out of place: a second backward finds them unchanged."""
    reciprocal, *gradients = ctx.saved_tensors
    if upstream is None:
        return [None for _ in gradients]
    scale = upstream * reciprocal
    return [None if g is None else (g * scale).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]


class _Product:
    """Rows of X W^T + b in the problem's dtype.

    16-bit operands: CUDA multiplies them as they are with float32 results (16-bit logits cost 4-23 % of the gradient); elsewhere
    there is no such product, so the weight is widened once and each chunk of X as it comes.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, problem: LinearProblem) -> None:
        common = torch.promote_types(x.dtype, weight.dtype)
        keep = x.is_cuda and common in (torch.float16, torch.bfloat16) and problem.dtype == torch.float32
        self.dtype = common if keep else problem.dtype
        self.x, self.counted = x, problem.targets.counted
        self.weight = weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(problem.dtype)

    def logits(self, out: Tensor, start: int, stop: int) -> Tensor:
        """Write rows start:stop of the logits to `out` [C, V]; returns the rows of X [C, D] that made them."""
        x = self.x[start:stop].to(self.dtype)
        if self.counted is not None:
            # 0 * NaN of a padded position would reach dW.
            x = x.masked_fill(~self.counted[start:stop, None], 0.0)
        if self.bias is not None and out.dtype == self.dtype:
            torch.addmm(self.bias, x, self.weight.t(), out=out)
        else:
            _matmul(x, self.weight.t(), out=out)
            if self.bias is not None:
                out += self.bias
        return x


def _matmul(a: Tensor, b: Tensor, *, out: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b, in place and in out's type: no temporary of out's size."""
    if a.dtype == out.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


class _RowLoss:
    """Per-row losses and the gradient of chunks of logits, in buffers [C, V] that every chunk reuses.

    For each (start, stop) of chunks(): fill student() (and teacher() for a dense one), then call: the row sums are recorded
    and d(sum_i w_i loss_i) / d(student logits) comes back in a buffer, valid until the next chunk.
    """

    def __init__(self, problem: LinearProblem, n: int, v: int, device: torch.device, *, grad: bool) -> None:
        self.problem, self.options, self.targets, self.grad = problem, problem.options, problem.targets, grad
        options, form = problem.options, problem.teacher
        self.label_share = 1.0 if form == "none" else options.alpha
        # A second softmax, of the labels' cross entropy, where its temperature is not the divergence's.
        self.apart = form != "none" and self.targets.labels is not None and options.student_temperature != 1.0
        self.dense = form == "dense" and options.teacher_temperature > 0
        self.keep_p1 = self.apart and grad and options.alpha > 0
        buffers = 2 + self.dense + (self.dense and options.divergence == "jsd") + self.keep_p1
        per_row = buffers * v * torch.empty((), dtype=problem.dtype).element_size()
        most = max(1, options.chunk_bytes // max(1, per_row))
        # Equal chunks: a last one of a few rows costs a whole pass over dW.
        self.rows = -(-n // max(1, -(-n // most)))
        self.buffers = [torch.empty(self.rows, v, dtype=problem.dtype, device=device) for _ in range(buffers)]
        self.n = n
        self.divergence, self.cross_entropy, self.correct = torch.zeros(3, n, dtype=problem.dtype, device=device)

    def chunks(self) -> list[tuple[int, int]]:
        return [(start, min(start + self.rows, self.n)) for start in range(0, self.n, max(1, self.rows))]

    def student(self, start: int, stop: int) -> Tensor:
        return self.buffers[0][: stop - start]

    def teacher(self, start: int, stop: int) -> Tensor:
        return self.buffers[1][: stop - start]

    def copy_rows(self, out: Tensor, source: Tensor, start: int, stop: int) -> None:
        """out = source[start:stop], and 0 where a position does not count: it may hold NaN."""
        out.copy_(source[start:stop])
        if self.targets.counted is not None:
            out.masked_fill_(~self.targets.counted[start:stop, None], 0.0)

    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(weighted loss, divergence, cross entropy, correct), summed over the counted rows."""
        columns = [self.divergence, self.cross_entropy, self.correct]
        if self.targets.weights is not None:
            # where, not times: a row that does not count may hold inf.
            weights = self.targets.weights
            columns = [torch.where(weights != 0, weights * column, 0.0) for column in columns]
        divergence, cross_entropy, correct = (column.sum() for column in columns)
        total = torch.zeros_like(divergence)
        # A share of 0 drops its term: 0 * inf would be NaN.
        if self.label_share > 0:
            total = total + self.label_share * cross_entropy
        if self.label_share < 1:
            total = total + (1.0 - self.label_share) * self.options.t2 * divergence
        return total, divergence, cross_entropy, correct

    def __call__(self, start: int, stop: int) -> Tensor | None:
        options, targets, rows = self.options, self.targets, slice(start, stop)
        s, *free = (buffer[: stop - start] for buffer in self.buffers)
        w = s.new_ones(stop - start) if targets.weights is None else targets.weights[rows]
        labels = None if targets.labels is None else targets.labels[rows]
        ids = None if targets.ids is None else targets.ids[rows]
        if self.problem.teacher == "dense" and not self.dense:
            ids = free[0].argmax(1)
        teacher = free.pop(0) if self.dense else None
        log_p = free.pop(0)

        if labels is not None:
            self.correct[rows] = s.argmax(1) == labels
        p1: Tensor | None = None  # softmax at temperature 1, where it is not the divergence's p
        if labels is not None and self.apart:
            p1 = torch.log_softmax(s, 1, out=free.pop() if self.keep_p1 else log_p)
            self.cross_entropy[rows] = -_pick(p1, labels)
            p1.exp_()
        if self.problem.teacher != "none" and options.student_temperature != 1.0:
            s.div_(options.student_temperature)
        torch.log_softmax(s, 1, out=log_p)
        if labels is not None and not self.apart:
            self.cross_entropy[rows] = -_pick(log_p, labels)

        # dD/dS = dD/da / temperature
        share = (1.0 - self.label_share) * options.t2 / options.student_temperature
        if teacher is not None:
            log_q = torch.log_softmax(_scaled(teacher, options.teacher_temperature), 1, out=s)
            value, g, p = _DENSE[options.divergence](log_p, log_q, [teacher, *free], options.beta)
            self.divergence[rows] = value
            if not self.grad:
                return None
            # zero_, not times: the gradient of an infinite divergence is not finite.
            g.mul_((share * w)[:, None]) if share > 0 else g.zero_()
            if labels is not None and self.label_share > 0:
                g.addcmul_(p if p1 is None else p1, (self.label_share * w)[:, None])
        else:
            p_share = torch.zeros_like(w)
            if ids is not None:
                self.divergence[rows], coefficient = _one_hot(options, _pick(log_p, ids))
                p_share = coefficient * (share * w)
            if not self.grad:
                return None
            total = p_share + self.label_share * w if labels is not None and p1 is None else p_share
            g = log_p.exp_().mul_(total[:, None])
            if p1 is not None and self.label_share > 0:
                g.addcmul_(p1, (self.label_share * w)[:, None])
            if ids is not None:
                _add_at(g, ids, -p_share)
        if labels is not None and self.label_share > 0:
            _add_at(g, labels, -self.label_share * w)
        return g


def _pick(x: Tensor, columns: Tensor) -> Tensor:
    return x.gather(1, columns[:, None]).squeeze(1)


def _add_at(x: Tensor, columns: Tensor, values: Tensor) -> None:
    x.scatter_add_(1, columns[:, None], values[:, None])


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """(logits - their maximum) / temperature, in place: 1e-20 does not overflow to inf - inf."""
    return logits if temperature == 1.0 else logits.sub_(logits.amax(1, keepdim=True)).div_(temperature)


# Each takes log p, log q [C, V] and further buffers, all of which it may overwrite, and returns D [C], dD/da [C, V] and p [C, V].
# A zero probability silences its term by a mask: its log ratio may be inf or, where both sides are 0, NaN. A NaN logit makes
# the whole row of p or q NaN, which no mask hides; JSD and TVD, whose gradients leave q out, add 0 * D to keep the NaN.


def _forward_kl(log_p: Tensor, log_q: Tensor, free: list[Tensor], beta: float) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.exp(log_q, out=free[0])
    terms = log_q.sub_(log_p).mul_(q).masked_fill_(q == 0, 0.0)
    value = terms.sum(1).clamp_(min=0.0)
    p = log_p.exp_()
    return value, torch.sub(p, q, out=log_q), p


def _soft_cross_entropy(log_p: Tensor, log_q: Tensor, free: list[Tensor], beta: float) -> tuple[Tensor, Tensor, Tensor]:
    q = log_q.exp_()
    terms = torch.mul(log_p, q, out=free[0]).masked_fill_(q == 0, 0.0)
    value = terms.sum(1).neg_()
    p = log_p.exp_()
    return value, torch.sub(p, q, out=free[0]), p


def _reverse_kl(log_p: Tensor, log_q: Tensor, free: list[Tensor], beta: float) -> tuple[Tensor, Tensor, Tensor]:
    p = torch.exp(log_p, out=free[0])
    ratio = torch.sub(log_p, log_q, out=log_q).masked_fill_(p == 0, 0.0)
    value = torch.mul(p, ratio, out=log_p).sum(1)
    return value.clamp(min=0.0), ratio.sub_(value[:, None]).mul_(p), p


def _jsd(log_p: Tensor, log_q: Tensor, free: list[Tensor], beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Through the log ratio and log1p(expm1): for p near q, log(p / m) taken as a difference keeps no correct digit."""
    ratio = torch.sub(log_p, log_q, out=free[0])
    ratio.nan_to_num_(nan=0.0, posinf=_MAX_LOG_RATIO, neginf=-_MAX_LOG_RATIO).clamp_(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    p, q = log_p.exp_(), log_q.exp_()
    # m / q >= beta, but for beta < 6e-8 float32 rounds 1 - beta to 1, and log1p(-1) is -inf; the same for m / p >= 1 - beta.
    m_over_q = torch.expm1(ratio, out=free[1]).mul_(1.0 - beta).log1p_().clamp_(min=math.log(beta))
    teacher_part = q.mul_(m_over_q).sum(1)
    m_over_p = ratio.neg_().expm1_().mul_(beta).log1p_().clamp_(min=math.log1p(-beta))
    student_part = torch.mul(m_over_p, p, out=q).sum(1)
    value = (beta * teacher_part + (1.0 - beta) * student_part).neg_().clamp_(min=0.0)
    return value, m_over_p.sub_((student_part + 0.0 * value)[:, None]).mul_(p).mul_(beta - 1.0), p


def _tvd(log_p: Tensor, log_q: Tensor, free: list[Tensor], beta: float) -> tuple[Tensor, Tensor, Tensor]:
    p, q = log_p.exp_(), log_q.exp_()
    difference = torch.sub(p, q, out=free[0])
    value = torch.abs(difference, out=q).sum(1).mul_(0.5)
    sign = difference.sign_()
    mean = torch.mul(p, sign, out=q).sum(1)
    return value, sign.sub_((mean + 0.0 * value)[:, None]).mul_(p).mul_(0.5), p


_Dense = Callable[[Tensor, Tensor, list[Tensor], float], tuple[Tensor, Tensor, Tensor]]
_DENSE: dict[str, _Dense] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "tvd": _tvd,
    "soft_cross_entropy": _soft_cross_entropy,
}


def _one_hot(options: LossOptions, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """D [C] and c [C], with dD/da = c (p - onehot), of a one-hot teacher; log_p [C] is the student's at the teacher's class.

    JSD, p at that class, m = beta + (1 - beta) p and the other classes' log(p / m) = -log(1 - beta):
    D = -beta log m + (1 - beta) (p log(p / m) - (1 - p) log(1 - beta));  c = -(1 - beta) p (log(p / m) + log(1 - beta)).
    """
    if options.divergence in ("forward_kl", "soft_cross_entropy"):
        return -log_p, torch.ones_like(log_p)
    p, rest = log_p.exp(), -torch.expm1(log_p)
    if options.divergence == "tvd":
        return rest, p
    assert options.divergence == "jsd"  # make_targets and LossOptions refuse reverse_kl
    beta, log_rest = options.beta, math.log1p(-options.beta)
    log_m = torch.log1p(rest * (beta - 1.0)).clamp_(min=math.log(beta))
    p_log_ratio = torch.xlogy(p, p) - p * log_m
    value = (1.0 - beta) * (p_log_ratio - rest * log_rest) - beta * log_m
    return value.clamp_(min=0.0), (beta - 1.0) * (p_log_ratio + p * log_rest)
