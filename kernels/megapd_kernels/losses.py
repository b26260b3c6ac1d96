"""The public losses: check the arguments, put them into one Problem, call the operation that serves it."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import ops
from .options import LossOptions, LossResult, accumulation_dtype, check_matrix, check_rows, check_vocabulary, make_targets
from .rows.base import Problem
from .shard import VocabularyShard
from .sparse import Convention


class CommonTargets(TypedDict, total=False):
    """Arguments that every loss takes.

    token_weights    [N], w_i; default 1
    ignore_index     default -100; positions with this label count for nothing, and may hold NaN; so do positions of weight 0
    denominator      what the weighted sum is divided by; default the weights of the counted positions; 0 gives loss 0 and
                     gradients 0
    options          default LossOptions()
    shard            this rank's part of the classes: then weights, biases and logits hold V classes of this rank, while labels
                     and ids number the classes of all ranks. Losses and gradients are those of the whole; hidden's gradient is
                     summed over the ranks, each of which calls with the same rows
    """

    token_weights: Tensor | None
    ignore_index: int
    denominator: Tensor | float | None
    options: LossOptions
    shard: VocabularyShard | None


class Targets(CommonTargets, total=False):
    """With labels [N] int64: needed for options.alpha > 0 and without a teacher, where the loss is their plain cross entropy."""

    labels: Tensor | None


def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    teacher_logits: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
    teacher_log_rest: Tensor | None = None,
    convention: Convention | None = None,
    **targets: Unpack[Targets],
) -> LossResult:
    """The distillation loss of the logits hidden @ weight.T + bias, without forming them: O(options.chunk_bytes) memory.

    hidden           [N, D] floating point, differentiable; N = 0 is allowed
    weight, bias     [V, D], [V] or None; differentiable. Mixed types are computed in the wider one.
    teacher          one of teacher_logits [N, V]; teacher_hidden [N, E] with teacher_weight [V, E] and teacher_bias [V] or None;
                     teacher_ids [N] int64, its argmax (one-hot, not for reverse_kl); teacher_ids and teacher_logprobs [N, K] in a
                     `convention`, see kernels/sparse.py, for `tail` with teacher_log_rest [N] where it is known; or nothing
    targets          see `Targets` and `CommonTargets`

    Logits, sums and gradients are accumulated in float32, or float64 where an input is; gradients come back in the type of
    their input. Only hidden, weight and bias are differentiated, once. The gradient is computed in forward, for those that need
    one, and kept (N x D and V x D); the inputs are not, so weight may be a ZeRO-3 parameter that is gathered in forward alone.
    With options.recompute it is the other way round.

    Raises ValueError that names the argument; an out-of-range label or id is torch's own index error.
    """
    device, options = hidden.device, targets.get("options", LossOptions())
    check_matrix("hidden", hidden, None, None, device)
    check_matrix("weight", weight, None, hidden.shape[1], device)
    rows = hidden.shape[0]
    if (teacher_hidden is None) != (teacher_weight is None):
        missing = "teacher_hidden" if teacher_hidden is None else "teacher_weight"
        raise ValueError(f"{missing}: teacher_hidden and teacher_weight go together; give both")
    if teacher_bias is not None and teacher_weight is None:
        raise ValueError("teacher_bias: has no meaning without teacher_weight; leave it out")
    _check_bias("bias", bias, weight.shape[0])
    if teacher_weight is not None and teacher_hidden is not None:
        check_matrix("teacher_hidden", teacher_hidden, rows, None, device)
        check_matrix("teacher_weight", teacher_weight, None, teacher_hidden.shape[1], device)
        _check_bias("teacher_bias", teacher_bias, teacher_weight.shape[0])
        common = _common_classes(options, "teacher_weight", teacher_weight.shape[0], weight.shape[0], targets.get("shard"))
        weight, teacher_weight = weight[:common], teacher_weight[:common]
        bias = None if bias is None else bias[:common]
        teacher_bias = None if teacher_bias is None else teacher_bias[:common]
    if teacher_logits is not None:
        check_matrix("teacher_logits", teacher_logits, rows, None, device)
        common = _common_classes(options, "teacher_logits", teacher_logits.shape[1], weight.shape[0], targets.get("shard"))
        weight, teacher_logits = weight[:common], teacher_logits[:, :common]
        bias = None if bias is None else bias[:common]
    problem = _problem(
        rows,
        weight.shape[0],
        device,
        accumulation_dtype(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_logits, teacher_logprobs),
        targets,
        teacher_logits=teacher_logits,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        teacher_ids=teacher_ids,
        teacher_logprobs=teacher_logprobs,
        teacher_log_rest=teacher_log_rest,
        convention=convention,
    )
    return LossResult(*ops.linear(hidden, weight, bias, problem))


def linear_softmax_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None = None,
    **targets: Unpack[Targets],
) -> LossResult:
    """`linear_distillation_loss` against a teacher's hidden states [N, E] and head [V, E], [V]; E need not be D."""
    return linear_distillation_loss(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        **targets,
    )


def linear_sparse_kl(
    student_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    logprobs: Tensor | None = None,
    *,
    convention: Convention | None = None,
    log_rest: Tensor | None = None,
    **targets: Unpack[Targets],
) -> LossResult:
    """`linear_distillation_loss` against a few classes a position: ids [N, K] int64 with logprobs [N, K] in a convention.

    tail, renormalised, support: a teacher's top K, distinct ids, see `topk_logits`. sampled: draws of the teacher's, logprobs the
    log of their weights, ids may repeat. ids [N] without logprobs: the teacher's argmax. kernels/sparse.py has the formulas.
    log_rest [N]: for tail, the log of the teacher's mass outside the ids; default log(1 - sum exp logprobs), with fewer digits.
    """
    return linear_distillation_loss(
        student_hidden,
        weight,
        bias,
        teacher_ids=ids,
        teacher_logprobs=logprobs,
        teacher_log_rest=log_rest,
        convention=convention,
        **targets,
    )


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, **targets: Unpack[CommonTargets]
) -> LossResult:
    """`linear_distillation_loss` of labels alone. Of the options, label_smoothing, z_loss, recompute and chunk_bytes count."""
    return linear_distillation_loss(hidden, weight, bias, labels=labels, **targets)


def softmax_kl(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    teacher_ids: Tensor | None = None,
    in_place: bool = False,
    **targets: Unpack[Targets],
) -> LossResult:
    """The distillation loss of student_logits [N, V] that exist already, against teacher_logits [N, V] or teacher_ids [N].

    As `linear_distillation_loss`, but the logits themselves are kept for backward, with a few numbers a row. in_place: backward
    writes the gradient over student_logits instead of beside it; then nothing else may read them, and backward runs once.
    """
    device, options = student_logits.device, targets.get("options", LossOptions())
    check_matrix("student_logits", student_logits, None, None, device)
    if in_place and 0 in student_logits.stride():
        raise ValueError("in_place: student_logits is an expanded view, whose positions share memory; make it contiguous")
    if teacher_logits is not None:
        check_matrix("teacher_logits", teacher_logits, student_logits.shape[0], None, device)
        common = _common_classes(
            options, "teacher_logits", teacher_logits.shape[1], student_logits.shape[1], targets.get("shard")
        )
        student_logits, teacher_logits = student_logits[:, :common], teacher_logits[:, :common]
    problem = _problem(
        student_logits.shape[0],
        student_logits.shape[1],
        device,
        accumulation_dtype(student_logits, teacher_logits),
        targets,
        teacher_logits=teacher_logits,
        teacher_ids=teacher_ids,
    )
    return LossResult(*ops.logits(student_logits, problem, in_place))


def _problem(
    rows: int,
    classes: int,
    device: torch.device,
    dtype: torch.dtype,
    targets: Targets,
    *,
    teacher_logits: Tensor | None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_ids: Tensor | None,
    teacher_logprobs: Tensor | None = None,
    teacher_log_rest: Tensor | None = None,
    convention: Convention | None = None,
) -> Problem:
    options, shard = targets.get("options", LossOptions()), targets.get("shard")
    if shard is not None:
        shard.check(classes)
    checked = make_targets(
        rows,
        device,
        dtype,
        options,
        classes=classes if shard is None else shard.total,
        dense_teachers=(teacher_logits is not None) + (teacher_hidden is not None),
        labels=targets.get("labels"),
        teacher_ids=teacher_ids,
        teacher_logprobs=teacher_logprobs,
        teacher_log_rest=teacher_log_rest,
        convention=convention,
        token_weights=targets.get("token_weights"),
        ignore_index=targets.get("ignore_index", -100),
        denominator=targets.get("denominator"),
    )
    return Problem(
        targets=checked,
        dtype=dtype,
        options=options,
        teacher_logits=_constant(teacher_logits),
        teacher_hidden=_constant(teacher_hidden),
        teacher_weight=_constant(teacher_weight),
        teacher_bias=_constant(teacher_bias),
        shard=shard,
    )


def _constant(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _common_classes(options: LossOptions, name: str, teacher: int, student: int, shard: VocabularyShard | None) -> int:
    if not options.common_vocabulary:
        check_vocabulary(name, teacher, student)
    elif shard is not None:
        raise ValueError("common_vocabulary: cannot be combined with a vocabulary shard; cut both heads to the same classes")
    return min(teacher, student)


def _check_bias(name: str, bias: Tensor | None, classes: int) -> None:
    if bias is not None:
        check_rows(name, bias, (classes,), bias.device, None)
