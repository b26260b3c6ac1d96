"""The row losses by Triton kernels: launches, and what the ranks of a vocabulary shard exchange between them.

One launch a chunk where this process has all classes and the teacher is dense or there is none; a teacher by ids takes two, with
the algebra of its few ids in torch between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sparse import SparseTeacher
from .base import Problem, RowLoss
from .ids import best_of, nucleus_, shape_
from .triton_dense import dense_rows
from .triton_math import (
    BEST,
    ENTROPY,
    LOG_SUM,
    LOG_SUM_ONE,
    MAXIMUM,
    MOMENTS,
    SUM,
    TEACHER_BEST,
    TEACHER_ENTROPY,
    TEACHER_LOG_SUM,
    TEACHER_MAXIMUM,
    columns,
    launch_shape,
    unit,
)
from .triton_student import student_rows

_M, _L, _L_ONE, _M_T, _L_T = (c.value for c in (MAXIMUM, LOG_SUM, LOG_SUM_ONE, TEACHER_MAXIMUM, TEACHER_LOG_SUM))
_SUM, _BEST, _BEST_T, _H, _H_T = (c.value for c in (SUM, BEST, TEACHER_BEST, ENTROPY, TEACHER_ENTROPY))
_MOMENTS = MOMENTS.value
_PADDING = 64  # rows of the buffers start at multiples of it, so that loads are as wide as they can be whatever V is


class _Sweeps(RowLoss):
    """Statistics of all rows, and the launches and exchanges that fill them."""

    def __init__(self, problem: Problem, n: int, v: int, device: torch.device, *, grad: bool, statistics: Tensor | None) -> None:
        super().__init__(problem, n, v, device, grad=grad)
        # Zeros: rows that do not count are not written, and their values must be finite.
        count = columns(len(self.mixture.members))
        self.statistics = torch.zeros(count, n, dtype=torch.float32, device=device) if statistics is None else statistics
        self.elements = [member.element() for _, member in self.mixture.members]
        only = self.elements[0] if len(self.elements) == 1 else None
        self.online = 0 if only is None else only.online

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
        """Fill statistics [columns, C] and, if given, gradient [C, V], of rows start:stop without or with a dense teacher."""
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
        launch_dense(self, student, teacher, None, statistics, labels, start, stop, sums=False)
        self._merge(statistics, dense=True)
        first = _MOMENTS if self.online == 0 else len(statistics)
        if self.online == 0 or self.options.per_token:
            launch_dense(self, student, teacher, None, statistics, labels, start, stop, statistics_known=True)
            for part in (statistics[first:], statistics[_H : _H_T + 1]):
                part.copy_(self.total(part))
        if gradient is not None:
            launch_dense(self, student, teacher, gradient, statistics, labels, start, stop, statistics_known=True, sums=False)

    def record_sweep(self, statistics: Tensor, label_logit: Tensor | None, rows: slice) -> None:
        """Turn statistics [columns, C] of all ranks into the rows' losses."""
        maximum, log_sum_one = statistics[_M], statistics[_L_ONE]
        if label_logit is not None:
            mean = statistics[_SUM] / self.classes if self.options.label_smoothing > 0 else None
            self.record_labels(rows, maximum, log_sum_one, statistics[_BEST], self._everywhere(label_logit), mean)
        self.record_log_sum(rows, maximum + log_sum_one)
        if self.options.per_token:
            self.records.best[rows], self.records.entropy[rows] = statistics[_BEST], statistics[_H]
            if self.dense:
                self.records.teacher_best[rows], self.records.teacher_entropy[rows] = statistics[_BEST_T], statistics[_H_T]
        if self.dense:
            self.records.divergences[:, rows] = self._divergences(statistics)

    def _divergences(self, statistics: Tensor) -> Tensor:
        """[M, C]; see triton_dense.py."""
        if self.online > 0:
            shift = {1: statistics[_L] - statistics[_L_T], 2: statistics[_L], 3: statistics[_L_T] - statistics[_L]}[self.online]
            values = [statistics[_MOMENTS] + shift]
        else:
            values = [member.value(statistics[_MOMENTS + 2 * i]) for i, (_, member) in enumerate(self.mixture.members)]
        return torch.stack(
            [
                value.clamp(min=0.0) if member.nonnegative else value
                for value, (_, member) in zip(values, self.mixture.members, strict=True)
            ]
        )

    def _merge(self, statistics: Tensor, *, dense: bool) -> None:
        """Statistics of this rank's classes -> of all ranks' (in place), the BEST column -> class."""
        shard = self.problem.shard
        if shard is None:
            return
        here = statistics.clone()
        _, best = shard.best(here[_M], here[_BEST].long())
        statistics[_BEST] = best.float()
        if self.options.per_token and dense:
            statistics[_BEST_T] = shard.best(here[_M_T], here[_BEST_T].long())[1].float()
        statistics[_SUM] = self.total(here[_SUM])
        temperature, tau = self.problem.temperature, self.options.teacher_temperature
        m, log_sum, l_one = shard.logsumexp(here[_M], (here[_L], temperature), (here[_L_ONE], 1.0))
        statistics[_M], statistics[_L], statistics[_L_ONE] = m, log_sum, l_one
        if not dense:
            if self.options.per_token:  # of parts with mass e^log_mass each
                log_mass = (here[_M] - m) / temperature + here[_L] - log_sum
                mass = log_mass.exp()
                statistics[_H] = self.total(torch.where(mass == 0, 0.0, mass * (here[_H] - log_mass)))
            return
        m_t, l_t = shard.logsumexp(here[_M_T], (here[_L_T], tau))
        statistics[_M_T], statistics[_L_T] = m_t, l_t
        if self.online == 0:
            return
        a_moved, b_moved = (here[_M] - m) / temperature, (here[_M_T] - m_t) / tau
        if self.online == 3:
            mass, shift = (a_moved + here[_L] - log_sum).exp(), a_moved - b_moved
        else:
            mass = (b_moved + here[_L_T] - l_t).exp()
            shift = -a_moved if self.online == 2 else b_moved - a_moved
        statistics[_MOMENTS] = self.total(torch.where(mass == 0, 0.0, mass * (here[_MOMENTS] + shift)))

    def _label_columns(self, start: int, stop: int) -> Tensor | None:
        """The labels as columns of this rank's part, -1 where they lie elsewhere."""
        if self.targets.labels is None:
            return None
        labels = self.targets.labels[start:stop]
        if self.problem.shard is None:
            return labels
        columns, mine = self.problem.shard.inside(labels, self.v)
        return columns.masked_fill(~mine, -1)

    def _shaped(self, logits: Tensor) -> Tensor:
        """The student's logits as they count, float32."""
        logits = logits.float()
        if self.options.shape > 0:
            logits = logits.clone()
            shape_(logits, self.options.logit_scale, self.options.soft_cap, slope=False)
        return logits

    def _label_logit(self, student: Tensor, labels: Tensor) -> Tensor:
        """[C], the logit at each label, 0 for label -1 (another rank's)."""
        picked = self._shaped(student.gather(1, labels.clamp(min=0)[:, None])).squeeze(1)
        return picked.masked_fill(labels < 0, 0.0)

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
        self._teacher = torch.empty_like(self._student) if self._holds_teacher() else None
        self._logits = None if self._teacher is not None or problem.teacher_logits is None else _row_major(problem.teacher_logits)
        if grad and gradient_dtype == torch.float16:
            self.gradient_scale = self._gradient_scale()
        self._gradient = torch.empty(self.rows, self._width, dtype=gradient_dtype, device=device) if grad else self._student

    def bytes_per_row(self) -> int:
        gradient = self._gradient_dtype.itemsize if self.grad else 0
        return self._width * (4 + 4 * self._holds_teacher() + gradient)

    def _holds_teacher(self) -> bool:
        """Whether the teacher's logits have a buffer: those that exist are read where they are, in their type, if all count."""
        return self.problem.teacher_hidden is not None or (
            self.problem.form == "dense" and not (self.dense and self.options.teacher_top_p is None)
        )

    def _gradient_scale(self) -> Tensor:
        """0-dim power of two: what brings the largest coefficient of a row's gradient to 2^8. A softmax over 2^17 classes is then
        above float16's least normal number, 2^-14, and terms of 2^8 times the coefficient are below its largest, 2^16."""
        options, problem, targets = self.options, self.problem, self.targets
        divergence = problem.share / problem.temperature * sum(weight for weight, _ in self.mixture.members)
        bound = (divergence + problem.label_share + 64.0 * options.z_loss) * options.logit_scale
        largest = torch.ones((), device=self.device)
        if targets.weights is not None and self.n > 0:
            largest = targets.weights.abs().amax()
            if targets.label_weights is not None:
                largest = largest * targets.label_weights.abs().amax().clamp(min=1.0)
        exponent = 8.0 - (largest * bound).log2().ceil()
        return torch.where(exponent.isfinite(), exponent, 0.0).clamp(-24, 24).exp2()

    def student(self, start: int, stop: int) -> Tensor:
        return self._student[: stop - start, : self.v]

    def teacher(self, start: int, stop: int) -> Tensor:
        if self._teacher is None:
            return self._student[:0] if self._logits is None else self._logits[start:stop]
        return self._teacher[: stop - start, : self.v]

    def __call__(self, start: int, stop: int) -> Tensor | None:
        student, teacher = self.student(start, stop), self.teacher(start, stop)
        gradient = self._gradient[: stop - start, : self.v] if self.grad else None
        statistics = self.statistics[:, start:stop]
        if self._teacher is not None and self.problem.teacher_logits is not None:
            self.copy_rows(teacher, self.problem.teacher_logits, start, stop)
        if self._teacher is not None and self.options.teacher_top_p is not None and self.dense:
            shaped = teacher.clone()
            shape_(shaped, self.options.teacher_logit_scale, self.options.teacher_soft_cap, slope=False)
            nucleus_(teacher, shaped, self.options.teacher_temperature, self.options.teacher_top_p)
        sparse = self._sparse(start, stop, student, teacher)
        self.record_agreement(slice(start, stop), student, teacher if self.problem.form == "dense" else None, sparse)
        labels = self._label_columns(start, stop)
        label_logit = None
        if labels is not None:
            label_logit = self._label_logit(student, labels)
        if sparse is None:
            self.sweep(student, teacher if self.dense else None, gradient, statistics, labels, start, stop)
            self.record_sweep(statistics, label_logit, slice(start, stop))
            return gradient

        shard, rows, w = self.problem.shard, slice(start, stop), self.weights(start, stop)
        columns, mine = (sparse.ids, None) if shard is None else shard.inside(sparse.ids, self.v)
        picks = student.gather(1, columns)
        low = torch.full_like(picks, self.floor())
        slope = shape_(picks, self.options.logit_scale, self.options.soft_cap, slope=True) if self.options.shape > 0 else None
        if mine is not None:
            picks, low = self.total(picks.masked_fill(~mine, 0.0)), torch.where(mine, low, torch.inf)
        mean_sum = None
        if labels is not None and self.options.label_smoothing > 0:
            mean_sum = self._shaped(student).sum(1)
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
        self.record_log_sum(rows, picked.maximum + picked.log_sum_one)
        if self.options.per_token:
            self.records.best[rows] = best_of(statistics[_M], statistics[_BEST].long(), picks, sparse.ids)
            self.records.entropy[rows] = picked.entropy(statistics[_H], sparse.first)
            self.record_teacher_ids(rows, sparse)
        at_ids, outside, outside_one = self.sparse_terms(rows, w, picked, sparse)
        if gradient is None:
            return None
        scale = self.gradient_scale
        launch_student(self, student, gradient, statistics, labels, start, stop, factors=(outside, outside_one), scale=scale)
        at_ids = at_ids if mine is None else at_ids.masked_fill(~mine, 0.0)
        if slope is not None:
            at_ids = at_ids * slope
        if scale is not None:
            at_ids = at_ids * scale
        return gradient.scatter_add_(1, columns, at_ids.to(gradient.dtype))

    def _sparse(self, start: int, stop: int, student: Tensor, teacher: Tensor) -> SparseTeacher | None:
        """sparse_rows; only the student's top k needs the logits as they count, as the argmax of both is the same."""
        if self.options.student_top_k is None or self.problem.form != "dense":
            return self.sparse_rows(start, stop, student, teacher)
        if self.options.teacher_shape > 0:
            self.shape_teacher(teacher)
        return self.sparse_rows(start, stop, student, teacher)


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
        self.record_agreement(slice(start, stop), student, teacher, None)
        self.record_sweep(statistics, None if labels is None else self._label_logit(student, labels), slice(start, stop))

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
            launch_dense(self, *tensors, 0, self.n, statistics_known=True, sums=False, scale=scale)
        if target is not out:
            out.copy_(target)


def _row_major(x: Tensor) -> Tensor:
    """Kernels step from column to column by 1; rows may lie anywhere."""
    return x if x.numel() == 0 or x.stride(1) == 1 else x.contiguous()


def launch_student(
    rows: _Sweeps,
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
    rows: _Sweeps,
    student: Tensor,
    teacher: Tensor,
    gradient: Tensor | None,
    statistics: Tensor,
    labels: Tensor | None,
    start: int,
    stop: int,
    *,
    statistics_known: bool = False,
    sums: bool = True,
    scale: Tensor | None = None,
) -> None:
    """dense_rows over rows start:stop. sums: form the divergences' where they are not online (else read the statistics)."""
    if student.shape[0] == 0:
        return
    options, problem = rows.options, rows.problem
    each = [(*member.parameters, 0.0, 0.0, 0.0)[:3] for _, member in rows.mixture.members]
    elements = [element for element in rows.elements if element is not None]
    assert len(elements) == len(each), "choose.py gives divergences without Triton to torch"
    parameters = [tuple(column) for column in zip(*each, strict=True)]
    dense_rows[(student.shape[0],)](
        **_arguments(rows, student, gradient, statistics, labels, start, stop, scale),
        teacher=teacher,
        teacher_stride=teacher.stride(0),
        teacher_temperature=options.teacher_temperature,
        teacher_scale=options.teacher_logit_scale,
        teacher_cap=options.teacher_soft_cap or 1.0,
        shares=tuple(weight * problem.share / problem.temperature for weight, _ in rows.mixture.members),
        first_parameters=parameters[0],
        second_parameters=parameters[1],
        third_parameters=parameters[2],
        TERMS=tuple(element.term for element in elements),
        SLOPES=tuple(element.slope or unit for element in elements),
        ONLINE=rows.online,
        STATISTICS=not statistics_known,
        SUMS=sums,
        TEACHER_SHAPE=options.teacher_shape,
        SHARE=problem.share > 0,
        ONE=problem.softmax_one and (problem.label_share > 0 or options.z_loss > 0),
        APART=rows.apart,
    )


def _arguments(
    rows: _Sweeps,
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
    label_weights = rows.targets.label_weights if labels is not None else None
    scale = rows.gradient_scale if scale is None and gradient is not None else scale
    share = rows.problem.label_share if labels is not None else 0.0
    output = student if gradient is None else gradient
    block, compiler = launch_shape(student.shape[1], two_softmaxes=rows.apart)
    return {
        "student": student,
        "gradient": output,
        "statistics": statistics,
        "labels": student if labels is None else labels,
        "weights": student if weights is None else weights[start:stop],
        "label_weights": student if label_weights is None else label_weights[start:stop],
        "scale": student if scale is None else scale,
        "student_stride": student.stride(0),
        "gradient_stride": output.stride(0),
        "statistics_stride": statistics.stride(0),
        "classes": student.shape[1],
        "temperature": rows.problem.temperature,
        "logit_scale": rows.options.logit_scale,
        "soft_cap": rows.options.soft_cap or 1.0,
        "label_share": share,
        "label_factor": share * (1.0 - smoothing),
        "smooth_factor": share * smoothing / rows.classes,
        "z_loss": rows.options.z_loss,
        "GRADIENT": gradient is not None,
        "LABELS": labels is not None,
        "WEIGHTS": weights is not None,
        "LABEL_WEIGHTS": label_weights is not None,
        "OUTPUTS": rows.options.per_token,
        "SHAPE": rows.options.shape,
        "SCALE": scale is not None,
        "SMOOTH": labels is not None and smoothing > 0,
        "BLOCK": block,
        **compiler,
    }
