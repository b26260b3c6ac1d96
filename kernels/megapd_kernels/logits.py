"""The losses of logits that exist already: forward reads them for the loss, backward reads them again and writes the gradient."""

from __future__ import annotations

from torch import Tensor

from .options import LossResult
from .rows.base import Problem, RowLoss
from .rows.choose import implementation, make_rows


def logits_loss(logits: Tensor, problem: Problem) -> tuple[LossResult, Tensor]:
    """The loss of logits [N, V], and what backward needs beside them."""
    if _direct(logits, problem):
        from .rows.triton import TritonLogits

        direct = TritonLogits(problem, logits)
        direct.forward()
        return direct.results(), direct.statistics
    rows = make_rows(problem, logits.shape[0], logits.shape[1], logits.device, grad=False)
    for start, stop in rows.chunks():
        _load(rows, logits, problem, start, stop)
        rows(start, stop)
    return rows.results(), logits.new_empty(0, dtype=problem.dtype)


def logits_gradient(logits: Tensor, problem: Problem, scale: Tensor, statistics: Tensor, out: Tensor) -> None:
    """out [N, V] = scale (0-dim) times the gradient of the weighted sum; out may be `logits` itself."""
    if _direct(logits, problem):
        from .rows.triton import TritonLogits

        TritonLogits(problem, logits, statistics).gradient(scale, out)
        return
    rows = make_rows(problem, logits.shape[0], logits.shape[1], logits.device, grad=True, gradient_dtype=logits.dtype)
    for start, stop in rows.chunks():
        _load(rows, logits, problem, start, stop)
        g = rows(start, stop)
        assert g is not None
        out[start:stop] = g * scale


def statistics_shape(logits: Tensor, problem: Problem) -> tuple[int, ...]:
    """Of what logits_loss keeps: a few numbers a row, or nothing."""
    if not _direct(logits, problem):
        return (0,)
    from .rows.triton_math import COLUMNS

    return (COLUMNS, logits.shape[0])


def _direct(logits: Tensor, problem: Problem) -> bool:
    """Whether kernels read the logits where they are. A teacher by ids needs a copy in which it marks them."""
    if implementation(logits.device, problem.dtype) == "torch":
        return False
    return problem.form == "none" or (problem.form == "dense" and problem.options.teacher_temperature > 0)


def _load(rows: RowLoss, logits: Tensor, problem: Problem, start: int, stop: int) -> None:
    rows.copy_rows(rows.student(start, stop), logits, start, stop)
    if problem.teacher_logits is not None:
        rows.copy_rows(rows.teacher(start, stop), problem.teacher_logits, start, stop)
