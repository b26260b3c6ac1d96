"""The row losses by Triton kernels: launches, and what the ranks of a vocabulary shard exchange between them.

One launch a chunk where this process has all classes and the teacher is dense or there is none; a teacher by ids takes two, with
the algebra of its few ids in torch between them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import Problem, RowLoss, best_of
from .triton_dense import NUMBERS, dense_rows
from .triton_math import (
    BEST,
    COLUMNS,
    LOG_SUM,
    LOG_SUM_ONE,
    MAXIMUM,
    MOMENT,
    SECOND_MOMENT,
    SUM,
    TEACHER_LOG_SUM,
    TEACHER_MAXIMUM,
    launch_shape,
)
from .triton_student import student_rows

_M, _L, _L_ONE, _M_T, _L_T = (c.value for c in (MAXIMUM, LOG_SUM, LOG_SUM_ONE, TEACHER_MAXIMUM, TEACHER_LOG_SUM))
_MOMENT, _SECOND, _SUM, _BEST = (c.value for c in (MOMENT, SECOND_MOMENT, SUM, BEST))
_PADDING = 64  # rows of the buffers start at multiples of it, so that loads are as wide as they can be whatever V is


class _Sweeps(RowLoss):
    """Statistics of all rows, and the launches and exchanges that fill them."""

    def __init__(self, problem: Problem, n: int, v: int, device: torch.device, *, grad: bool, statistics: Tensor | None) -> None:
        super().__init__(problem, n, v, device, grad=grad)
        # Zeros: rows that do not count are not written, and their values must be finite.
        self.statistics = torch.zeros(COLUMNS, n, dtype=torch.float32, device=device) if statistics is None else statistics

    def sweep(
        self,
        student: Tensor,
        teacher: Tensor | None,
        gradient: Tensor | None,
        statistics: Tensor,
        labels: Tensor | None,
        start: int,
        stop: int,
    ) -> None:
        """Fill statistics [COLUMNS, C] and, if given, gradient [C, V], of rows start:stop without or with a dense teacher."""
        if self.problem.shard is None:
            if teacher is None:
                launch_student(self, student, gradient, statistics, labels, start, stop)
            else:
                launch_dense(self, student, teacher, gradient, statistics, labels, start, stop)
            return
        if teacher is None:
            launch_student(self, student, None, statistics, labels, start, stop)
            self._merge(statistics, dense=False)
            if gradient is not None:
                launch_student(self, student, gradient, statistics, labels, start, stop, statistics_known=True)
            return
        launch_dense(self, student, teacher, None, statistics, labels, start, stop, moments=False)
        self._merge(statistics, dense=True)
        if self.options.divergence in ("jsd", "tvd"):
            launch_dense(self, student, teacher, None, statistics, labels, start, stop, statistics_known=True)
            statistics[_MOMENT : _SECOND + 1] = self.total(statistics[_MOMENT : _SECOND + 1])
        if gradient is not None:
            launch_dense(self, student, teacher, gradient, statistics, labels, start, stop, statistics_known=True, moments=False)

    def record_sweep(self, statistics: Tensor, label_logit: Tensor | None, rows: slice) -> None:
        """Turn statistics [COLUMNS, C] of all ranks into the rows' losses."""
        maximum, log_sum_one = statistics[_M], statistics[_L_ONE]
        if label_logit is not None:
            mean = statistics[_SUM] / self.classes if self.options.label_smoothing > 0 else None
            self.record_labels(rows, maximum, log_sum_one, statistics[_BEST], self._everywhere(label_logit), mean)
        if self.options.z_loss > 0:
            self.log_sum[rows] = maximum + log_sum_one
        if self.dense:
            self.divergence[rows] = self._divergence(statistics)

    def _divergence(self, statistics: Tensor) -> Tensor:
        moment, second = statistics[_MOMENT], statistics[_SECOND]
        kind, beta = self.options.divergence, self.options.beta
        if kind == "tvd":
            return moment / 2
        if kind == "jsd":
            return -(beta * moment + (1.0 - beta) * second).clamp(max=0.0)
        if kind == "soft_cross_entropy":
            return moment + statistics[_L]
        sign = 1.0 if kind == "forward_kl" else -1.0
        return (moment + sign * (statistics[_L] - statistics[_L_T])).clamp(min=0.0)

    def _merge(self, statistics: Tensor, *, dense: bool) -> None:
        """Statistics of this rank's classes -> of all ranks' (in place), the BEST column -> class."""
        shard = self.problem.shard
        if shard is None:
            return
        here = statistics.clone()
        _, best = shard.best(here[_M], here[_BEST].long())
        statistics[_BEST] = best.float()
        statistics[_SUM] = self.total(here[_SUM])
        temperature, tau = self.problem.temperature, self.options.teacher_temperature
        m, log_sum, l_one = shard.logsumexp(here[_M], (here[_L], temperature), (here[_L_ONE], 1.0))
        statistics[_M], statistics[_L], statistics[_L_ONE] = m, log_sum, l_one
        if not dense:
            return
        m_t, l_t = shard.logsumexp(here[_M_T], (here[_L_T], tau))
        statistics[_M_T], statistics[_L_T] = m_t, l_t
        kind = self.options.divergence
        if kind in ("jsd", "tvd"):
            return
        a_moved, b_moved = (here[_M] - m) / temperature, (here[_M_T] - m_t) / tau
        if kind == "reverse_kl":
            mass, shift = (a_moved + here[_L] - log_sum).exp(), a_moved - b_moved
        else:
            mass = (b_moved + here[_L_T] - l_t).exp()
            shift = -a_moved if kind == "soft_cross_entropy" else b_moved - a_moved
        statistics[_MOMENT] = self.total(torch.where(mass == 0, 0.0, mass * (here[_MOMENT] + shift)))

    def _label_columns(self, start: int, stop: int) -> Tensor | None:
        """The labels as columns of this rank's part, -1 where they lie elsewhere."""
        if self.targets.labels is None:
            return None
        labels = self.targets.labels[start:stop]
        if self.problem.shard is None:
            return labels
        columns, mine = self.problem.shard.inside(labels, self.v)
        return columns.masked_fill(~mine, -1)

    def _everywhere(self, label_logit: Tensor) -> Tensor:
        return label_logit if self.problem.shard is None else self.total(label_logit)


class TritonRows(_Sweeps):
    """Chunks of logits in own buffers: float32 for student and teacher, the gradient in the type of the products that follow."""

    def __init__(
        self, problem: Problem, n: int, v: int, device: torch.device, *, grad: bool, gradient_dtype: torch.dtype
    ) -> None:
        self._gradient_dtype = gradient_dtype
        self._width = -(-v // _PADDING) * _PADDING
        super().__init__(problem, n, v, device, grad=grad, statistics=None)
        self._student = torch.empty(self.rows, self._width, dtype=torch.float32, device=device)
        has_teacher = problem.form == "dense"
        self._teacher = torch.empty_like(self._student) if has_teacher else self._student
        self._gradient = torch.empty(self.rows, self._width, dtype=gradient_dtype, device=device) if grad else self._student

    def bytes_per_row(self) -> int:
        gradient = self._gradient_dtype.itemsize if self.grad else 0
        return self._width * (4 + 4 * (self.problem.form == "dense") + gradient)

    def student(self, start: int, stop: int) -> Tensor:
        return self._student[: stop - start, : self.v]

    def teacher(self, start: int, stop: int) -> Tensor:
        return self._teacher[: stop - start, : self.v]

    def __call__(self, start: int, stop: int) -> Tensor | None:
        student, teacher = self.student(start, stop), self.teacher(start, stop)
        gradient = self._gradient[: stop - start, : self.v] if self.grad else None
        statistics = self.statistics[:, start:stop]
        sparse = self.sparse_rows(start, stop, teacher)
        labels = self._label_columns(start, stop)
        label_logit = None
        if labels is not None:
            label_logit = _label_logit(student, labels)
        if sparse is None:
            self.sweep(student, teacher if self.dense else None, gradient, statistics, labels, start, stop)
            self.record_sweep(statistics, label_logit, slice(start, stop))
            return gradient

        shard, rows, w = self.problem.shard, slice(start, stop), self.weights(start, stop)
        columns, mine = (sparse.ids, None) if shard is None else shard.inside(sparse.ids, self.v)
        picks = student.gather(1, columns)
        low = torch.full_like(picks, self.floor())
        if mine is not None:
            picks, low = self.total(picks.masked_fill(~mine, 0.0)), torch.where(mine, low, torch.inf)
        mean_sum = student.sum(1) if labels is not None and self.options.label_smoothing > 0 else None
        # From here on the student's logits are those of the classes outside the ids. amin with inf leaves another rank's alone.
        student.scatter_reduce_(1, columns, low, "amin")
        launch_student(self, student, None, statistics, labels, start, stop)
        if mean_sum is not None:
            statistics[_SUM] = mean_sum
        self._merge(statistics, dense=False)
        picked = self.pick(statistics[_M], statistics[_L], statistics[_L_ONE], picks, sparse)
        if label_logit is not None:
            best = best_of(statistics[_M], statistics[_BEST].long(), picks, sparse.ids)
            mean = statistics[_SUM] / self.classes if mean_sum is not None else None
            self.record_labels(rows, picked.maximum, picked.log_sum_one, best, self._everywhere(label_logit), mean)
        if self.options.z_loss > 0:
            self.log_sum[rows] = picked.maximum + picked.log_sum_one
        at_ids, outside, outside_one = self.sparse_terms(rows, w, picked, sparse)
        if gradient is None:
            return None
        launch_student(self, student, gradient, statistics, labels, start, stop, factors=(outside, outside_one))
        at_ids = at_ids if mine is None else at_ids.masked_fill(~mine, 0.0)
        return gradient.scatter_add_(1, columns, at_ids.to(gradient.dtype))


class TritonLogits(_Sweeps):
    """Logits [N, V] of any strides and types that stay where they are: forward() for the loss, gradient() for the gradient."""

    def __init__(self, problem: Problem, logits: Tensor, statistics: Tensor | None = None) -> None:
        super().__init__(problem, logits.shape[0], logits.shape[1], logits.device, grad=False, statistics=statistics)
        self._student = _row_major(logits)
        self._teacher = None if problem.teacher_logits is None else _row_major(problem.teacher_logits)

    def bytes_per_row(self) -> int:
        return 0

    def student(self, start: int, stop: int) -> Tensor:
        return self._student[start:stop]

    def teacher(self, start: int, stop: int) -> Tensor:
        assert self._teacher is not None
        return self._teacher[start:stop]

    def __call__(self, start: int, stop: int) -> None:
        labels = self._label_columns(start, stop)
        student, statistics = self.student(start, stop), self.statistics[:, start:stop]
        teacher = None if self._teacher is None else self.teacher(start, stop)
        self.sweep(student, teacher, None, statistics, labels, start, stop)
        self.record_sweep(statistics, None if labels is None else _label_logit(student, labels), slice(start, stop))

    def forward(self) -> None:
        self(0, self.n)

    def gradient(self, scale: Tensor, out: Tensor) -> None:
        """out [N, V] = scale times the gradient, from the statistics of an earlier forward."""
        target = out if out.stride(1) == 1 or out.numel() == 0 else torch.empty_like(self._student)
        labels, scale = self._label_columns(0, self.n), scale.float()
        if self._teacher is None:
            launch_student(self, self._student, target, self.statistics, labels, 0, self.n, statistics_known=True, scale=scale)
        else:
            tensors = (self._student, self._teacher, target, self.statistics, labels)
            launch_dense(self, *tensors, 0, self.n, statistics_known=True, moments=False, scale=scale)
        if target is not out:
            out.copy_(target)


def _row_major(x: Tensor) -> Tensor:
    """Kernels step from column to column by 1; rows may lie anywhere."""
    return x if x.numel() == 0 or x.stride(1) == 1 else x.contiguous()


def _label_logit(student: Tensor, labels: Tensor) -> Tensor:
    """[C], the logit at each label, 0 for label -1 (another rank's)."""
    picked = student.gather(1, labels.clamp(min=0)[:, None]).squeeze(1).float()
    return picked.masked_fill(labels < 0, 0.0)


def launch_student(
    rows: RowLoss,
    student: Tensor,
    gradient: Tensor | None,
    statistics: Tensor,
    labels: Tensor | None,
    start: int,
    stop: int,
    *,
    statistics_known: bool = False,
    factors: tuple[Tensor, Tensor | None] | None = None,
    scale: Tensor | None = None,
) -> None:
    """student_rows over rows start:stop: the statistics, the gradient if given, or both. factors: see the kernel."""
    if student.shape[0] == 0:
        return
    outside, outside_one = factors if factors is not None else (None, None)
    student_rows[(student.shape[0],)](
        **_arguments(rows, student, gradient, statistics, labels, start, stop, scale),
        outside=student if outside is None else outside,
        outside_one=student if outside_one is None else outside_one,
        STATISTICS=not statistics_known and factors is None,
        FACTORS=factors is not None,
        APART=rows.apart if factors is None else outside_one is not None,
    )


def launch_dense(
    rows: RowLoss,
    student: Tensor,
    teacher: Tensor,
    gradient: Tensor | None,
    statistics: Tensor,
    labels: Tensor | None,
    start: int,
    stop: int,
    *,
    statistics_known: bool = False,
    moments: bool = True,
    scale: Tensor | None = None,
) -> None:
    """dense_rows over rows start:stop. moments: for JSD and TVD, sum them (else they are read from the statistics)."""
    if student.shape[0] == 0:
        return
    options, problem = rows.options, rows.problem
    dense_rows[(student.shape[0],)](
        **_arguments(rows, student, gradient, statistics, labels, start, stop, scale),
        teacher=teacher,
        teacher_stride=teacher.stride(0),
        teacher_temperature=options.teacher_temperature,
        share=problem.share / problem.temperature,
        beta=options.beta,
        log_beta=math.log(options.beta),
        log_rest=math.log1p(-options.beta),
        DIVERGENCE=NUMBERS[options.divergence],
        STATISTICS=not statistics_known,
        MOMENTS=moments,
        SHARE=problem.share > 0,
        ONE=problem.softmax_one and (problem.label_share > 0 or options.z_loss > 0),
        APART=rows.apart,
    )


def _arguments(
    rows: RowLoss,
    student: Tensor,
    gradient: Tensor | None,
    statistics: Tensor,
    labels: Tensor | None,
    start: int,
    stop: int,
    scale: Tensor | None,
) -> dict[str, Any]:
    """What both kernels take. A pointer that a variant does not read is the student's."""
    weights, smoothing = rows.targets.weights, rows.options.label_smoothing
    share = rows.problem.label_share if labels is not None else 0.0
    output = student if gradient is None else gradient
    block, compiler = launch_shape(student.shape[1], two_softmaxes=rows.apart)
    return {
        "student": student,
        "gradient": output,
        "statistics": statistics,
        "labels": student if labels is None else labels,
        "weights": student if weights is None else weights[start:stop],
        "scale": student if scale is None else scale,
        "student_stride": student.stride(0),
        "gradient_stride": output.stride(0),
        "statistics_stride": statistics.stride(0),
        "classes": student.shape[1],
        "temperature": rows.problem.temperature,
        "label_share": share,
        "label_factor": share * (1.0 - smoothing),
        "smooth_factor": share * smoothing / rows.classes,
        "z_loss": rows.options.z_loss,
        "GRADIENT": gradient is not None,
        "LABELS": labels is not None,
        "WEIGHTS": weights is not None,
        "SCALE": scale is not None,
        "SMOOTH": labels is not None and smoothing > 0,
        "BLOCK": block,
        **compiler,
    }
