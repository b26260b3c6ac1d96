"""The losses as custom operations: torch.compile takes each as one node, autograd knows its gradient, nothing inside is traced.

An operation's arguments are tensors, numbers and strings, so the checked Problem travels as those and is put together inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear import linear_loss
from .logits import logits_gradient, logits_loss, statistics_shape
from .options import LossOptions, LossResult, Targets, reciprocal_or_zero
from .rows.base import Problem
from .shard import VocabularyShard
from .sparse import SparseTeacher

# Everything of a Problem: first its tensors, then the rest. A missing tensor is None.
_TENSORS = (
    "labels",
    "counted",
    "weights",
    "denominator",
    "ids",
    "log_q",
    "log_rest",
    "first",
    "teacher_logits",
    "teacher_hidden",
    "teacher_weight",
    "teacher_bias",
)
_OPTIONS = {
    "divergence": "str",
    "teacher_temperature": "float",
    "student_temperature": "float",
    "alpha": "float",
    "beta": "float",
    "scale_t2": "bool",
    "label_smoothing": "float",
    "z_loss": "float",
    "recompute": "bool",
    "chunk_bytes": "int?",
}
_REST = {"buckets": "bool", "entropy_free": "bool", "group": "str", "start": "int", "total": "int"}
_PROBLEM = ", ".join(
    [f"Tensor{'' if name == 'denominator' else '?'} {name}" for name in _TENSORS]
    + [f"{kind} {name}" for name, kind in {**_OPTIONS, **_REST}.items()]
)
_COUNT = len(_TENSORS) + len(_OPTIONS) + len(_REST)
_RECOMPUTE = len(_TENSORS) + list(_OPTIONS).index("recompute")
_SCALARS = len(LossResult._fields)


def pack(problem: Problem) -> tuple[Any, ...]:
    """A Problem as arguments of the operations."""
    targets, sparse, options, shard = problem.targets, problem.targets.sparse, problem.options, problem.shard
    return (
        targets.labels,
        targets.counted,
        targets.weights,
        targets.denominator,
        None if sparse is None else sparse.ids,
        None if sparse is None else sparse.log_q,
        None if sparse is None else sparse.log_rest,
        None if sparse is None else sparse.first,
        problem.teacher_logits,
        problem.teacher_hidden,
        problem.teacher_weight,
        problem.teacher_bias,
        *[getattr(options, name) for name in _OPTIONS],
        sparse is not None and sparse.buckets,
        sparse is not None and sparse.entropy_free,
        "" if shard is None else shard.group,
        0 if shard is None else shard.start,
        0 if shard is None else shard.total,
    )


def _unpack(arguments: Sequence[Any]) -> Problem:
    labels, counted, weights, denominator, ids, log_q, log_rest, first = arguments[:8]
    logits, hidden, head, bias = arguments[8 : len(_TENSORS)]
    rest = len(_TENSORS) + len(_OPTIONS)
    options = LossOptions(**dict(zip(_OPTIONS, arguments[len(_TENSORS) : rest], strict=True)))
    buckets, entropy_free, group, start, total = arguments[rest:]
    sparse = None if ids is None else SparseTeacher(ids, log_q, log_rest, first, buckets, entropy_free)
    shard = VocabularyShard(group, start, total) if group else None
    targets = Targets(labels, sparse, counted, weights, denominator)
    return Problem(targets, denominator.dtype, options, logits, hidden, head, bias, shard)


def _linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need_x: bool, need_w: bool, need_b: bool, *problem: Any
) -> tuple[Tensor, ...]:
    *scalars, dx, dw, db = linear_loss(hidden, weight, bias, _unpack(problem), (need_x, need_w, need_b))
    return *scalars, *(hidden.new_empty(0) if g is None else g for g in (dx, dw, db))


_linear_op = torch.library.custom_op(
    "megapd_kernels::linear_loss",
    _linear,
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, bool need_x, bool need_w, bool need_b, {_PROBLEM}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_linear_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need_x: bool, need_w: bool, need_b: bool, *problem: Any
) -> tuple[Tensor, ...]:
    dtype = problem[3].dtype
    gradients = [
        like.new_empty(like.shape if need else (0,), dtype=dtype if need else hidden.dtype)
        for like, need in zip((hidden, weight, weight[:, 0]), (need_x, need_w, need_b), strict=True)
    ]
    return *(hidden.new_empty((), dtype=dtype) for _ in range(_SCALARS)), *gradients


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, _need_x, _need_w, _need_b, *problem = inputs
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (hidden, weight, bias))
    ctx.recompute = problem[_RECOMPUTE]
    ctx.set_materialize_grads(False)
    # The weight is not kept unless asked for: under ZeRO-3 it is there in forward only, and comes back in backward at a price.
    tensors = [reciprocal_or_zero(problem[3])]
    if ctx.recompute:
        tensors += [hidden, weight, bias, *problem[: len(_TENSORS)]]
        ctx.settings = problem[len(_TENSORS) :]
    else:
        tensors += output[_SCALARS:]
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(*output[1:])


@once_differentiable
def _linear_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    count = 6 + _COUNT
    if upstream is None:
        return (None,) * count
    reciprocal, *saved = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    gradients = saved
    if ctx.recompute:
        hidden, weight, bias, *tensors = saved
        _, _, _, _, *gradients = _linear_op(hidden, weight, bias, *needed, *tensors, *ctx.settings)
    # The saved gradients times upstream / denominator, out of place: a second backward finds them unchanged.
    scale = upstream * reciprocal
    scaled = [(g * scale).to(dtype) if need else None for g, dtype, need in zip(gradients, ctx.dtypes, needed, strict=True)]
    return *scaled, *(None,) * (count - 3)


_linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem) -> LossResult:
    """The loss is differentiable in hidden [N, D], weight [V, D] and bias [V]."""
    wanted = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias)]
    needs = [False] * 3 if problem.options.recompute else wanted
    return LossResult(*_linear_op(hidden, weight, bias, *needs, *pack(problem))[:_SCALARS])


def _logits(logits: Tensor, in_place: bool, *problem: Any) -> tuple[Tensor, ...]:
    return logits_loss(logits, _unpack(problem))


_logits_op = torch.library.custom_op(
    "megapd_kernels::logits_loss",
    _logits,
    mutates_args=(),
    schema=f"(Tensor logits, bool in_place, {_PROBLEM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_logits_op.register_fake
def _(logits: Tensor, in_place: bool, *problem: Any) -> tuple[Tensor, ...]:
    dtype = problem[3].dtype
    statistics = logits.new_empty(statistics_shape(logits, _unpack(problem)), dtype=dtype)
    return *(logits.new_empty((), dtype=dtype) for _ in range(_SCALARS)), statistics


def _logits_gradient(logits: Tensor, scale: Tensor, statistics: Tensor, *problem: Any) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    logits_gradient(logits, _unpack(problem), scale, statistics, out)
    return out


_gradient_op = torch.library.custom_op(
    "megapd_kernels::logits_gradient",
    _logits_gradient,
    mutates_args=(),
    schema=f"(Tensor logits, Tensor scale, Tensor statistics, {_PROBLEM}) -> Tensor",
)


@_gradient_op.register_fake
def _(logits: Tensor, scale: Tensor, statistics: Tensor, *problem: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _logits_gradient_in_place(logits: Tensor, scale: Tensor, statistics: Tensor, *problem: Any) -> None:
    logits_gradient(logits, _unpack(problem), scale, statistics, logits)


_gradient_in_place_op = torch.library.custom_op(
    "megapd_kernels::logits_gradient_",
    _logits_gradient_in_place,
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, Tensor scale, Tensor statistics, {_PROBLEM}) -> ()",
)


@_gradient_in_place_op.register_fake
def _(logits: Tensor, scale: Tensor, statistics: Tensor, *problem: Any) -> None:
    return None


def _logits_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ctx.in_place, *problem = inputs
    ctx.settings = problem[len(_TENSORS) :]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, output[_SCALARS], *problem[: len(_TENSORS)])
    ctx.mark_non_differentiable(*output[1:])


@once_differentiable
def _logits_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    count = 2 + _COUNT
    if upstream is None:
        return (None,) * count
    logits, statistics, *tensors = ctx.saved_tensors
    scale = upstream * reciprocal_or_zero(tensors[3])
    if ctx.in_place:
        _gradient_in_place_op(logits, scale, statistics, *tensors, *ctx.settings)
        gradient = logits
    else:
        gradient = _gradient_op(logits, scale, statistics, *tensors, *ctx.settings)
    return gradient, *(None,) * (count - 1)


_logits_op.register_autograd(_logits_backward, setup_context=_logits_setup)


def logits(logits: Tensor, problem: Problem, in_place: bool) -> LossResult:
    """The loss is differentiable in logits [N, V]; in_place: backward writes their gradient over them."""
    return LossResult(*_logits_op(logits, in_place, *pack(problem))[:_SCALARS])
