"""The losses as custom operations: torch.compile takes each as one node, autograd knows its gradient, nothing inside is traced.

An operation's arguments are tensors, numbers and strings, so the checked Problem travels as those and is put together inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
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
_TARGETS = ("labels", "counted", "weights", "denominator")
_SPARSE = ("ids", "log_q", "log_rest", "first")
_TEACHER = ("teacher_logits", "teacher_hidden", "teacher_weight", "teacher_bias")
_TENSORS = (*_TARGETS, *_SPARSE, *_TEACHER)
_KINDS = {"Divergence": "str", "int | None": "int?"}  # a schema's words for the types that have others there
_OPTIONS = {field.name: _KINDS.get(str(field.type), field.type) for field in fields(LossOptions)}
_REST = {"buckets": "bool", "entropy_free": "bool", "group": "str", "start": "int", "total": "int"}
_PROBLEM = ", ".join(
    [f"Tensor{'' if name == 'denominator' else '?'} {name}" for name in _TENSORS]
    + [f"{kind} {name}" for name, kind in {**_OPTIONS, **_REST}.items()]
)
_RECOMPUTE = len(_TENSORS) + list(_OPTIONS).index("recompute")
_SCALARS = len(LossResult._fields)


def pack(problem: Problem) -> tuple[Any, ...]:
    """A Problem as arguments of the operations."""
    sparse, shard = problem.targets.sparse, problem.shard
    return (
        *[getattr(problem.targets, name) for name in _TARGETS],
        *[None if sparse is None else getattr(sparse, name) for name in _SPARSE],
        *[getattr(problem, name) for name in _TEACHER],
        *[getattr(problem.options, name) for name in _OPTIONS],
        *((False, False) if sparse is None else (sparse.buckets, sparse.entropy_free)),
        *(("", 0, 0) if shard is None else (shard.group, shard.start, shard.total)),
    )


def _unpack(arguments: Sequence[Any]) -> Problem:
    labels, counted, weights, denominator, ids, log_q, log_rest, first, *teacher = arguments[: len(_TENSORS)]
    rest = len(_TENSORS) + len(_OPTIONS)
    options = LossOptions(**dict(zip(_OPTIONS, arguments[len(_TENSORS) : rest], strict=True)))
    buckets, entropy_free, group, start, total = arguments[rest:]
    sparse = None if ids is None else SparseTeacher(ids, log_q, log_rest, first, buckets, entropy_free)
    targets = Targets(labels, sparse, counted, weights, denominator)
    shard = VocabularyShard(group, start, total) if group else None
    return Problem(targets, denominator.dtype, options, **dict(zip(_TEACHER, teacher, strict=True)), shard=shard)


@torch.library.custom_op(
    "megapd_kernels::linear_loss",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, bool need_x, bool need_w, bool need_b, {_PROBLEM}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need_x: bool, need_w: bool, need_b: bool, *problem: Any
) -> tuple[Tensor, ...]:
    result, gradients = linear_loss(hidden, weight, bias, _unpack(problem), (need_x, need_w, need_b))
    return *result, *(hidden.new_empty(0) if g is None else g for g in gradients)


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
    if upstream is None:
        return (None,) * len(ctx.needs_input_grad)
    reciprocal, *saved = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    gradients = saved
    if ctx.recompute:
        hidden, weight, bias, *tensors = saved
        _, _, _, _, *gradients = _linear_op(hidden, weight, bias, *needed, *tensors, *ctx.settings)
    # The saved gradients times upstream / denominator, out of place: a second backward finds them unchanged.
    scale = upstream * reciprocal
    scaled = [(g * scale).to(dtype) if need else None for g, dtype, need in zip(gradients, ctx.dtypes, needed, strict=True)]
    return *scaled, *(None,) * len(ctx.needs_input_grad[3:])


_linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem) -> LossResult:
    """The loss is differentiable in hidden [N, D], weight [V, D] and bias [V]."""
    wanted = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias)]
    needs = [False] * 3 if problem.options.recompute else wanted
    return LossResult(*_linear_op(hidden, weight, bias, *needs, *pack(problem))[:_SCALARS])


@torch.library.custom_op(
    "megapd_kernels::logits_loss",
    mutates_args=(),
    schema=f"(Tensor logits, bool in_place, {_PROBLEM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _logits_op(logits: Tensor, in_place: bool, *problem: Any) -> tuple[Tensor, ...]:
    result, statistics = logits_loss(logits, _unpack(problem))
    return *result, statistics


@_logits_op.register_fake
def _(logits: Tensor, in_place: bool, *problem: Any) -> tuple[Tensor, ...]:
    dtype = problem[3].dtype
    statistics = logits.new_empty(statistics_shape(logits, _unpack(problem)), dtype=dtype)
    return *(logits.new_empty((), dtype=dtype) for _ in range(_SCALARS)), statistics


@torch.library.custom_op(
    "megapd_kernels::logits_gradient",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor scale, Tensor statistics, {_PROBLEM}) -> Tensor",
)
def _gradient_op(logits: Tensor, scale: Tensor, statistics: Tensor, *problem: Any) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    logits_gradient(logits, _unpack(problem), scale, statistics, out)
    return out


@_gradient_op.register_fake
def _(logits: Tensor, scale: Tensor, statistics: Tensor, *problem: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op(
    "megapd_kernels::logits_gradient_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, Tensor scale, Tensor statistics, {_PROBLEM}) -> ()",
)
def _gradient_in_place_op(logits: Tensor, scale: Tensor, statistics: Tensor, *problem: Any) -> None:
    logits_gradient(logits, _unpack(problem), scale, statistics, logits)


def _logits_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ctx.in_place, *problem = inputs
    ctx.settings = problem[len(_TENSORS) :]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, output[_SCALARS], *problem[: len(_TENSORS)])
    ctx.mark_non_differentiable(*output[1:])


@once_differentiable
def _logits_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * len(ctx.needs_input_grad)
    logits, statistics, *tensors = ctx.saved_tensors
    scale = upstream * reciprocal_or_zero(tensors[3])
    if ctx.in_place:
        _gradient_in_place_op(logits, scale, statistics, *tensors, *ctx.settings)
        gradient = logits
    else:
        gradient = _gradient_op(logits, scale, statistics, *tensors, *ctx.settings)
    return gradient, *(None,) * len(ctx.needs_input_grad[1:])


_logits_op.register_autograd(_logits_backward, setup_context=_logits_setup)


def logits(logits: Tensor, problem: Problem, in_place: bool) -> LossResult:
    """The loss is differentiable in logits [N, V]; in_place: backward writes their gradient over them."""
    return LossResult(*_logits_op(logits, in_place, *pack(problem))[:_SCALARS])
