"""The losses as custom operations: torch.compile takes each as one node, autograd knows its gradient, nothing inside is traced.

An operation's arguments are tensors, numbers and strings, so the checked Problem travels as those and is put together inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .divergences import NAMES, Mixture, named
from .linear import linear_loss
from .logits import logits_gradient, logits_loss, statistics_shape
from .options import NUMBERS, LossOptions, LossResult
from .rows.base import Problem, TeacherForm
from .rows.records import outputs_shape, token_outputs
from .shard import VocabularyShard
from .sparse import SparseTeacher
from .targets import Targets, reciprocal_or_zero

# Everything of a Problem: first its tensors, then the rest. A missing tensor is None.
_TARGETS = ("labels", "counted", "weights", "denominator", "label_weights")
_SPARSE = ("ids", "log_q", "log_rest", "first")
_TEACHER = ("teacher_logits", "teacher_hidden", "teacher_weight", "teacher_bias")
_TENSORS = (*_TARGETS, *_SPARSE, *_TEACHER, "numbers")
# A schema's words for the types that have others there. A divergence travels as its members' names, weights and parameters.
_KINDS = {"int | None": "int?", "torch.dtype | None": "ScalarType?", "Reduction": "str"}
_OPTIONS = {
    f.name: _KINDS.get(str(f.type), f.type) for f in fields(LossOptions) if f.name not in ("divergence", "beta", *NUMBERS)
}
_REST = {
    "divergences": "str[]",
    "whole": "bool",
    "buckets": "bool",
    "entropy_free": "bool",
    "group": "str",
    "start": "int",
    "total": "int",
}
_PROBLEM = ", ".join(
    [f"Tensor{'' if name in ('denominator', 'numbers') else '?'} {name}" for name in _TENSORS]
    + [f"{kind} {name}" for name, kind in {**_OPTIONS, **_REST}.items()]
)
_RECOMPUTE = len(_TENSORS) + list(_OPTIONS).index("recompute")
_REDUCTION = len(_TENSORS) + list(_OPTIONS).index("reduction")
_PER_TOKEN = len(_TENSORS) + list(_OPTIONS).index("per_token")
_NAMES = len(_TENSORS) + len(_OPTIONS)
_DENOMINATOR, _WEIGHTS = _TENSORS.index("denominator"), _TENSORS.index("weights")
_IDS, _LOGITS = _TENSORS.index("ids"), _TENSORS.index("teacher_logits")
_RESULTS = 5  # LossResult's four and what is per token


def pack(problem: Problem) -> tuple[Any, ...]:
    """A Problem as arguments of the operations."""
    sparse, shard = problem.targets.sparse, problem.shard
    return (
        *[getattr(problem.targets, name) for name in _TARGETS],
        *[None if sparse is None else getattr(sparse, name) for name in _SPARSE],
        *[getattr(problem, name) for name in _TEACHER],
        problem.options.numbers,
        *[getattr(problem if name == "product_dtype" else problem.options, name) for name in _OPTIONS],
        [member.name for _, member in problem.options.mixture.members],
        problem.options.whole_teacher,
        *((False, False) if sparse is None else (sparse.buckets, sparse.entropy_free)),
        *(("", 0, 0) if shard is None else (shard.group, shard.start, shard.total)),
    )


def _unpack(arguments: Sequence[Any]) -> Problem:
    labels, counted, weights, denominator, label_weights, ids, log_q, log_rest, first, *teacher, numbers = arguments[
        : len(_TENSORS)
    ]
    names, _, buckets, entropy_free, group, start, total = arguments[_NAMES:]
    values: list[Any] = [None if math.isnan(value) else value for value in numbers.tolist()]
    options = LossOptions(
        divergence=_mixture(names, values[len(NUMBERS) :]),
        **dict(zip(NUMBERS, values, strict=False)),
        **dict(zip(_OPTIONS, arguments[len(_TENSORS) : _NAMES], strict=True)),
    )
    sparse = None if ids is None else SparseTeacher(ids, log_q, log_rest, first, buckets, entropy_free)
    targets = Targets(labels, sparse, counted, weights, denominator, label_weights)
    shard = VocabularyShard(group, start, total) if group else None
    given = dict(zip(_TEACHER, teacher, strict=True))
    return Problem(targets, denominator.dtype, options, **given, shard=shard, product_dtype=options.product_dtype)


def _mixture(names: Sequence[str], numbers: Sequence[float]) -> Mixture:
    """Of the names, and each one's weight and parameters."""
    members, left = [], list(numbers)
    for name in names:
        count = 1 + len(fields(NAMES[name]))  # type: ignore[arg-type]
        members.append((left[0], named(name, *left[1:count])))
        left = left[count:]
    return Mixture(tuple(members))


def _loss_like(like: Tensor, problem: Sequence[Any]) -> tuple[Tensor, ...]:
    """Of Records.results, for rows of `like`, without values."""
    dtype, members = problem[_DENOMINATOR].dtype, len(problem[_NAMES])
    loss = like.new_empty((len(like),) if problem[_REDUCTION] == "none" else (), dtype=dtype)
    sums = [like.new_empty((), dtype=dtype) for _ in range(3)]
    return loss, *sums, like.new_empty(outputs_shape(members, len(like)) if problem[_PER_TOKEN] else (0,), dtype=dtype)


def _result(outputs: Sequence[Tensor]) -> LossResult:
    return LossResult(outputs[0], outputs[1], outputs[2], outputs[3], token_outputs(outputs[4]))


@torch.library.custom_op(
    "megapd_kernels::linear_loss",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, bool need_x, bool need_w, bool need_b, {_PROBLEM}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    dtype = problem[_DENOMINATOR].dtype
    gradients = [
        like.new_empty(like.shape if need else (0,), dtype=dtype if need else hidden.dtype)
        for like, need in zip((hidden, weight, weight[:, 0]), (need_x, need_w, need_b), strict=True)
    ]
    return *_loss_like(hidden, problem), *gradients


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, _need_x, _need_w, _need_b, *problem = inputs
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (hidden, weight, bias))
    ctx.recompute = _recompute(problem)
    ctx.set_materialize_grads(False)
    # The weight is not kept unless asked for: under ZeRO-3 it is there in forward only, and comes back in backward at a price.
    tensors = [reciprocal_or_zero(problem[_DENOMINATOR])]
    if ctx.recompute:
        tensors += [hidden, weight, bias, *problem[: len(_TENSORS)]]
        ctx.settings = problem[len(_TENSORS) :]
    else:
        tensors += output[_RESULTS:]
    _save(ctx, tensors)
    ctx.mark_non_differentiable(*output[1:])


def _recompute(problem: Sequence[Any]) -> bool:
    """Whether backward forms the logits again: asked for, or since each position has its own upstream gradient."""
    return bool(problem[_RECOMPUTE]) or problem[_REDUCTION] == "none"


def _save(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """For backward; autograd refuses tensors of inference_mode, which as constants can lie beside."""
    ctx.constants = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.constants else t for i, t in enumerate(tensors)))


def _saved(ctx: Any) -> list[Tensor | None]:
    return [ctx.constants.get(i, t) for i, t in enumerate(ctx.saved_tensors)]


def _weigh(tensors: list[Tensor | None], upstream: Tensor) -> None:
    """The positions' weights times their upstream gradients [N], for reduction none."""
    weights = tensors[_WEIGHTS]
    tensors[_WEIGHTS] = upstream.detach() if weights is None else weights * upstream.detach()


class _Once(torch.autograd.Function):
    """The identity, of a gradient that has no derivative of its own."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError(
            "the losses of megapd_kernels have no second derivative; distillation_loss, the reference in plain torch, has"
        )


def _once(upstream: Tensor, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients whose backward is an error rather than nothing, where one may be asked for."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return list(gradients)
    return [None if g is None else _Once.apply(g.requires_grad_()) for g in gradients]  # type: ignore[no-untyped-call]


def _linear_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * len(ctx.needs_input_grad)
    reciprocal, *saved = _saved(ctx)
    assert reciprocal is not None
    needed = list(ctx.needs_input_grad[:3])
    gradients = saved
    if ctx.recompute:
        hidden, weight, bias, *tensors = saved
        if upstream.dim() == 1:
            _weigh(tensors, upstream)
        with torch.no_grad():
            gradients = _linear_op(hidden, weight, bias, *needed, *tensors, *ctx.settings)[_RESULTS:]
    # The saved gradients times upstream / denominator, out of place: a second backward finds them unchanged.
    scale = reciprocal if upstream.dim() == 1 else upstream.detach() * reciprocal
    scaled = [
        (g * scale).to(dtype) if need and g is not None else None
        for g, dtype, need in zip(gradients, ctx.dtypes, needed, strict=True)
    ]
    return *_once(upstream, scaled), *(None,) * len(ctx.needs_input_grad[3:])


_linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem) -> LossResult:
    """The loss is differentiable in hidden [N, D], weight [V, D] and bias [V]."""
    wanted = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias)]
    packed = pack(problem)
    needs = [False] * 3 if _recompute(packed) else wanted
    return _result(_linear_op(hidden, weight, bias, *needs, *packed))


@torch.library.custom_op(
    "megapd_kernels::logits_loss",
    mutates_args=(),
    schema=f"(Tensor logits, bool in_place, {_PROBLEM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _logits_op(logits: Tensor, in_place: bool, *problem: Any) -> tuple[Tensor, ...]:
    result, statistics = logits_loss(logits, _unpack(problem))
    return *result, statistics


@_logits_op.register_fake
def _(logits: Tensor, in_place: bool, *problem: Any) -> tuple[Tensor, ...]:
    dtype, names, whole, teacher = problem[_DENOMINATOR].dtype, problem[_NAMES], problem[_NAMES + 1], problem[_LOGITS]
    mixture = Mixture(tuple((1.0, named(name)) for name in names))
    form: TeacherForm = "sparse" if problem[_IDS] is not None else "none" if teacher is None else "dense"
    statistics = logits.new_empty(statistics_shape(logits, dtype, mixture, form, whole=whole), dtype=dtype)
    return *_loss_like(logits, problem), statistics


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
    _save(ctx, [logits, output[_RESULTS], *problem[: len(_TENSORS)]])
    ctx.mark_non_differentiable(*output[1:])


def _logits_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * len(ctx.needs_input_grad)
    logits, statistics, *tensors = _saved(ctx)
    denominator = tensors[_DENOMINATOR]
    assert denominator is not None
    scale = reciprocal_or_zero(denominator)
    if upstream.dim() == 1:
        _weigh(tensors, upstream)
    else:
        scale = upstream.detach() * scale
    if ctx.in_place and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("in_place: the gradient overwrites the logits, of which create_graph needs the values; leave it out")
    with torch.no_grad():
        if ctx.in_place:
            _gradient_in_place_op(logits, scale, statistics, *tensors, *ctx.settings)
            gradient = logits
        else:
            gradient = _gradient_op(logits, scale, statistics, *tensors, *ctx.settings)
    if not ctx.in_place:
        (gradient,) = _once(upstream, [gradient])
    return gradient, *(None,) * len(ctx.needs_input_grad[1:])


_logits_op.register_autograd(_logits_backward, setup_context=_logits_setup)


def logits(logits: Tensor, problem: Problem, in_place: bool) -> LossResult:
    """The loss is differentiable in logits [N, V]; in_place: backward writes their gradient over them."""
    return _result(_logits_op(logits, in_place, *pack(problem)))
