"""The losses of logits that exist already: forward reads them for the loss, backward reads them again and writes the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .divergences import Mixture
from .rows.base import Problem, TeacherForm
from .rows.choose import implementation, make_rows
from .sparse import check_ids


def logits_loss(logits: Tensor, problem: Problem) -> tuple[tuple[Tensor, ...], Tensor]:
    """The results (see Records.results) of logits [N, V], and what backward needs beside them."""
    if problem.targets.sparse is not None:
        check_ids(problem.targets.sparse, problem.targets.counted)
    if _direct(logits, problem):
        from .rows.triton import TritonLogits

        direct = TritonLogits(problem, logits)
        direct.forward()
        return direct.results(), direct.statistics
    rows = make_rows(problem, logits.shape[0], logits.shape[1], logits.device, grad=False)
    for start, stop in rows.chunks():
        rows.copy_rows(rows.student(start, stop), logits, start, stop)
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
        rows.copy_rows(rows.student(start, stop), logits, start, stop)
        g = rows(start, stop)
        assert g is not None
        out[start:stop] = g * (scale if rows.gradient_scale is None else scale / rows.gradient_scale)


def statistics_shape(logits: Tensor, dtype: torch.dtype, mixture: Mixture, form: TeacherForm, *, whole: bool) -> tuple[int, ...]:
    """Of what logits_loss keeps: a few numbers a row, or nothing. whole: LossOptions.whole_teacher."""
    if not _reads_in_place(logits, dtype, mixture, form, whole=whole):
        return (0,)
    from .rows.triton_math import columns

    return (columns(len(mixture.members)), logits.shape[0])


def _direct(logits: Tensor, problem: Problem) -> bool:
    options = problem.options
    return _reads_in_place(logits, problem.dtype, options.mixture, problem.form, whole=options.whole_teacher)


def _reads_in_place(logits: Tensor, dtype: torch.dtype, mixture: Mixture, form: TeacherForm, *, whole: bool) -> bool:
    """Whether kernels read the logits where they are. A teacher by ids needs a copy in which it marks them."""
    return implementation(logits.device, dtype, mixture) == "triton" and (form == "none" or (form == "dense" and whole))
