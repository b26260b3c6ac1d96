"""The public operations: check the arguments, choose the implementation that serves the tensor, call it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .linear import LinearProblem, chunked_linear_loss, chunked_logits_loss
from .options import LossOptions, LossResult, accumulation_dtype, check_matrix, check_vocabulary, make_targets

Implementation = Literal["torch"]


def implementation(tensor: Tensor) -> Implementation:
    """The implementation that serves `tensor`. The only place that decides; kernels for a device are added here."""
    return "torch"


def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    denominator: Tensor | float | None = None,
    options: LossOptions = LossOptions(),  # noqa: B008 (frozen)
) -> LossResult:
    """The distillation loss of the logits hidden @ weight.T + bias, without forming them: O(options.chunk_bytes) memory.

    hidden           [N, D] floating point, differentiable; N = 0 is allowed
    weight, bias     [V, D], [V] or None; differentiable. Mixed types are computed in the wider one.
    labels           [N] int64; needed for options.alpha > 0 and without a teacher, where the loss is their plain cross entropy
    teacher          one of teacher_logits [N, V]; teacher_hidden [N, E] with teacher_weight [V, E] and teacher_bias [V] or None;
                     teacher_ids [N] int64, its argmax (one-hot, not for reverse_kl); or nothing
    token_weights    [N], w_i; default 1
    ignore_index     positions with this label count for nothing, and may hold NaN; so do positions of weight 0
    denominator      what the weighted sum is divided by; default the weights of the counted positions; 0 gives loss 0 and
                     gradients 0

    Logits, sums and gradients are accumulated in float32, or float64 where an input is; gradients come back in the type of
    their input. Only hidden, weight and bias are differentiated, once. The gradient is computed in forward, for those that need
    one, and kept (N x D and V x D); the inputs are not, so weight may be a ZeRO-3 parameter that is gathered in forward alone.

    Raises ValueError that names the argument; an out-of-range label or id is torch's own index error.
    """
    device = hidden.device
    check_matrix("hidden", hidden, None, None, device)
    check_matrix("weight", weight, None, hidden.shape[1], device)
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    _check_bias("bias", bias, vocabulary)
    if (teacher_hidden is None) != (teacher_weight is None):
        missing = "teacher_hidden" if teacher_hidden is None else "teacher_weight"
        raise ValueError(f"{missing}: teacher_hidden and teacher_weight go together; give both")
    if teacher_bias is not None and teacher_weight is None:
        raise ValueError("teacher_bias: has no meaning without teacher_weight; leave it out")
    if teacher_hidden is not None and teacher_weight is not None:
        check_matrix("teacher_hidden", teacher_hidden, rows, None, device)
        check_matrix("teacher_weight", teacher_weight, None, teacher_hidden.shape[1], device)
        check_vocabulary("teacher_weight", teacher_weight.shape[0], vocabulary)
        _check_bias("teacher_bias", teacher_bias, vocabulary)
    problem = _problem(
        rows,
        vocabulary,
        device,
        accumulation_dtype(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_logits),
        options,
        labels=labels,
        teacher_logits=teacher_logits,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        teacher_ids=teacher_ids,
        token_weights=token_weights,
        ignore_index=ignore_index,
        denominator=denominator,
    )
    assert implementation(hidden) == "torch"
    return chunked_linear_loss(hidden, weight, bias, problem)


def linear_softmax_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    denominator: Tensor | float | None = None,
    options: LossOptions = LossOptions(),  # noqa: B008
) -> LossResult:
    """`linear_distillation_loss` against a teacher's hidden states [N, E] and head [V, E]."""
    return linear_distillation_loss(
        hidden,
        weight,
        bias,
        labels=labels,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        token_weights=token_weights,
        ignore_index=ignore_index,
        denominator=denominator,
        options=options,
    )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    denominator: Tensor | float | None = None,
    options: LossOptions = LossOptions(),  # noqa: B008
) -> LossResult:
    """`linear_distillation_loss` without a teacher: the labels' cross entropy. Of the options, chunk_bytes alone counts."""
    return linear_distillation_loss(
        hidden,
        weight,
        bias,
        labels=labels,
        token_weights=token_weights,
        ignore_index=ignore_index,
        denominator=denominator,
        options=options,
    )


def softmax_kl(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    denominator: Tensor | float | None = None,
    options: LossOptions = LossOptions(),  # noqa: B008
) -> LossResult:
    """The distillation loss of student_logits [N, V] that exist already, against teacher_logits [N, V] or teacher_ids [N].

    As `linear_distillation_loss`; kept for backward is the gradient alone, [N, V] in the logits' type. The teacher is a constant.
    """
    check_matrix("student_logits", student_logits, None, None, student_logits.device)
    problem = _problem(
        student_logits.shape[0],
        student_logits.shape[1],
        student_logits.device,
        accumulation_dtype(student_logits, teacher_logits),
        options,
        labels=labels,
        teacher_logits=teacher_logits,
        teacher_ids=teacher_ids,
        token_weights=token_weights,
        ignore_index=ignore_index,
        denominator=denominator,
    )
    assert implementation(student_logits) == "torch"
    return chunked_logits_loss(student_logits, problem)


def _problem(
    rows: int,
    vocabulary: int,
    device: torch.device,
    dtype: torch.dtype,
    options: LossOptions,
    *,
    labels: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_ids: Tensor | None,
    token_weights: Tensor | None,
    ignore_index: int,
    denominator: Tensor | float | None,
) -> LinearProblem:
    if teacher_logits is not None:
        check_vocabulary("teacher_logits", teacher_logits.shape[-1], vocabulary)
        check_matrix("teacher_logits", teacher_logits, rows, vocabulary, device)
    targets = make_targets(
        rows,
        device,
        dtype,
        options,
        teachers=sum(form is not None for form in (teacher_logits, teacher_hidden, teacher_ids)),
        labels=labels,
        teacher_ids=teacher_ids,
        token_weights=token_weights,
        ignore_index=ignore_index,
        denominator=denominator,
    )
    return LinearProblem(
        targets=targets,
        teacher_logits=_constant(teacher_logits),
        teacher_hidden=_constant(teacher_hidden),
        teacher_weight=_constant(teacher_weight),
        teacher_bias=_constant(teacher_bias),
        dtype=dtype,
        options=options,
    )


def _constant(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _check_bias(name: str, bias: Tensor | None, vocabulary: int) -> None:
    if bias is not None and bias.shape != (vocabulary,):
        raise ValueError(f"{name}: expected shape ({vocabulary},), got {tuple(bias.shape)}")
