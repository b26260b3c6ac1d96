"""The losses of hidden states and a head in O(chunk) memory.

For each chunk of C rows the logits S = X W^T + b (and the teacher's T) are formed in buffers that are allocated once, the
loss of the rows is read off, S gives way to G = d(sum_i w_i loss_i) / dS, and at once

    dX[chunk] = G W        dW += G^T X[chunk]        db += sum_rows G

so that backward only multiplies by the upstream gradient over the denominator, and no tensor of N x V exists. Nothing is
divided by the denominator before that: at fp16 the saved gradients keep a magnitude near 1. With options.recompute forward
computes the loss alone and backward does the above.

Letters: N positions, C rows of a chunk, V classes (of this rank), D student width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows.base import Problem
from .rows.choose import make_rows
from .sparse import check_ids


def linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem, needs: tuple[bool, bool, bool]
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The results (see Records.results) of hidden [N, D], weight [V, D], bias [V] or None, and the gradients of the weighted sum
    with respect to each, in the accumulation type; needs: which are asked for."""
    n, v, dtype, device = hidden.shape[0], weight.shape[0], problem.dtype, hidden.device
    if problem.targets.sparse is not None:
        check_ids(problem.targets.sparse, problem.targets.counted)
    operands = problem.product_dtype
    student = Product(hidden, weight, bias, dtype, problem.targets.counted, operands)
    teacher: Product | None = None
    if problem.teacher_hidden is not None:
        assert problem.teacher_weight is not None
        parts = (problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias)
        teacher = Product(*parts, dtype, problem.targets.counted, operands)
    rows = make_rows(problem, n, v, device, grad=any(needs), gradient_dtype=student.dtype)
    dx = torch.empty(n, hidden.shape[1], dtype=dtype, device=device) if needs[0] else None
    dw = torch.zeros(v, weight.shape[1], dtype=dtype, device=device) if needs[1] else None
    db = torch.zeros(v, dtype=dtype, device=device) if needs[2] else None
    for start, stop in rows.chunks():
        x = student.logits(rows.student(start, stop), start, stop)
        if teacher is not None:
            teacher.logits(rows.teacher(start, stop), start, stop)
        g = rows(start, stop)
        if g is None:
            continue
        if db is not None:
            db += g.sum(0, dtype=dtype)
        g = g.to(student.dtype)
        if dx is not None:
            _matmul(g, student.weight, out=dx[start:stop])
        if dw is not None:
            _matmul(g.t(), x, out=dw, add=True)
    if rows.gradient_scale is not None:
        for gradient in (dx, dw, db):
            if gradient is not None:
                gradient /= rows.gradient_scale
    if dx is not None and problem.shard is not None:
        problem.shard.reduce(dx)
    return rows.results(), (dx, dw, db)


class Product:
    """Rows of X W^T + b in `dtype`; rows that are not `counted` [N] as if X were 0.

    16-bit operands: CUDA multiplies them as they are with float32 results (16-bit logits cost 4-23 % of the gradient); elsewhere
    there is no such product, so the weight is widened once and each chunk of X as it comes. operands: round both to this type.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        counted: Tensor | None = None,
        operands: torch.dtype | None = None,
    ) -> None:
        self.rounded = operands or torch.promote_types(x.dtype, weight.dtype)
        keep = x.is_cuda and self.rounded in (torch.float16, torch.bfloat16) and dtype == torch.float32
        self.dtype = self.rounded if keep else dtype
        self.x, self.counted = x, counted
        self.weight = weight.to(self.rounded).to(self.dtype)
        self.bias = None if bias is None else bias.to(dtype)

    def logits(self, out: Tensor, start: int, stop: int) -> Tensor:
        """Write rows start:stop of the logits to `out` [C, V]; returns the rows of X [C, D] that made them."""
        x = self.x[start:stop].to(self.rounded).to(self.dtype)
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
