"""The public losses: check the arguments, put them into one Problem, call the operation that serves it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import ops
from .inputs import flatten, refuse_forward_mode, split_head, unflatten
from .options import LossOptions, LossResult, known_names
from .rows.base import Problem
from .shard import VocabularyShard
from .sparse import Convention
from .targets import Positions, Teacher, accumulation_dtype, check_logits, check_rows, common_classes, make_targets


@known_names
def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
    teacher_log_rest: Tensor | None = None,
    convention: Convention | None = None,
    labels: Tensor | None = None,
    token_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    denominator: Tensor | float | None = None,
    options: LossOptions | None = None,
    shard: VocabularyShard | None = None,
) -> LossResult:
    """The distillation loss of the logits hidden @ weight.T + bias, without forming them: O(options.chunk_bytes) memory.

    hidden           [N, D] floating point, differentiable; N = 0 is allowed. [B, T, D], any leading dimensions, is taken too: all
                     that is [N] or [N, ...] below, and what comes back for each position, then has them in N's place
    weight, bias     [V, D], [V] or None; differentiable. Mixed types are computed in the wider one, see product_dtype. A DTensor
                     that is sharded by classes is this rank's part of them: no `shard` is needed
    teacher          one of teacher_logits [N, V]; teacher_hidden [N, E] with teacher_weight [V, E] and teacher_bias [V] or None;
                     teacher_ids [N] int64, its argmax (one-hot, not for reverse_kl); teacher_ids and teacher_logprobs [N, K] in a
                     `convention`, see sparse.py, for `tail` with teacher_log_rest [N] where it is known; or nothing
    labels           [N] int64 or int32: needed for options.alpha > 0 and without a teacher, where the loss is their plain cross
                     entropy
    token_weights    [N], w_i; default 1. A bool or integer mask is taken as numbers
    class_weights    [V] (of all ranks), of the labels' cross entropy; without a teacher the default denominator counts them, as
                     torch's cross_entropy does
    ignore_index     positions with this label count for nothing, and may hold NaN; so do positions of weight 0
    denominator      what the weighted sum is divided by; default the weights of the counted positions; 0 gives loss 0 and
                     gradients 0
    options          default LossOptions()
    shard            this rank's part of the classes: then weights, biases and logits hold V classes of this rank, while labels
                     and ids number the classes of all ranks. Losses and gradients are those of the whole; hidden's gradient is
                     summed over the ranks, each of which calls with the same rows

    Logits, sums and gradients are accumulated in float32, or float64 where an input is; gradients come back in the type of
    their input. Only hidden, weight and bias are differentiated, once. The gradient is computed in forward, for those that need
    one, and kept (N x D and V x D); the inputs are not, so weight may be a ZeRO-3 parameter that is gathered in forward alone.
    With options.recompute, or a loss for each position, it is the other way round. A teacher's logits are read in their type,
    bf16 and fp8 too, and may come from inference_mode.

    Raises ValueError that names the argument, TypeError for an unknown one; an out-of-range label or id is torch's own index
    error.
    """
    teacher = Teacher(
        teacher_logits, teacher_hidden, teacher_weight, teacher_bias, teacher_ids, teacher_logprobs, teacher_log_rest, convention
    )
    return _linear(
        hidden, weight, bias, teacher, Positions(labels, token_weights, ignore_index, denominator, class_weights), options, shard
    )


@known_names
def linear_softmax_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
    token_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    denominator: Tensor | float | None = None,
    options: LossOptions | None = None,
    shard: VocabularyShard | None = None,
) -> LossResult:
    """`linear_distillation_loss` against a teacher's hidden states [N, E] and head [V, E], [V]; E need not be D."""
    teacher = Teacher(hidden=teacher_hidden, weight=teacher_weight, bias=teacher_bias)
    return _linear(
        hidden, weight, bias, teacher, Positions(labels, token_weights, ignore_index, denominator, class_weights), options, shard
    )


@known_names
def linear_sparse_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    teacher_log_rest: Tensor | None = None,
    convention: Convention | None = None,
    labels: Tensor | None = None,
    token_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    denominator: Tensor | float | None = None,
    options: LossOptions | None = None,
    shard: VocabularyShard | None = None,
) -> LossResult:
    """`linear_distillation_loss` against a few classes a position: teacher_ids, teacher_logprobs [N, K] in a convention.

    tail, renormalised, support: a teacher's top K, distinct ids, see `topk_logits`. sampled: draws of the teacher's, logprobs the
    log of their weights, ids may repeat. teacher_ids [N] without logprobs: the teacher's argmax. sparse.py has the formulas.
    teacher_log_rest [N]: for tail, the log of the teacher's mass outside the ids; default log(1 - sum exp logprobs), with fewer
    digits.
    """
    teacher = Teacher(ids=teacher_ids, logprobs=teacher_logprobs, log_rest=teacher_log_rest, convention=convention)
    return _linear(
        hidden, weight, bias, teacher, Positions(labels, token_weights, ignore_index, denominator, class_weights), options, shard
    )


@known_names
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    denominator: Tensor | float | None = None,
    options: LossOptions | None = None,
    shard: VocabularyShard | None = None,
) -> LossResult:
    """`linear_distillation_loss` of labels alone. Of the options, label_smoothing, z_loss, recompute and chunk_bytes count."""
    return _linear(
        hidden,
        weight,
        bias,
        Teacher(),
        Positions(labels, token_weights, ignore_index, denominator, class_weights),
        options,
        shard,
    )


@known_names
def softmax_kl(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    teacher_ids: Tensor | None = None,
    labels: Tensor | None = None,
    token_weights: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    denominator: Tensor | float | None = None,
    options: LossOptions | None = None,
    shard: VocabularyShard | None = None,
    in_place: bool = False,
) -> LossResult:
    """The distillation loss of student_logits [N, V] that exist already, against teacher_logits [N, V] or teacher_ids [N].

    As `linear_distillation_loss`, but the logits themselves are kept for backward, with a few numbers a row. in_place: backward
    writes the gradient over student_logits instead of beside it; then nothing else may read them, and backward runs once.
    """
    options = LossOptions() if options is None else options
    positions = Positions(labels, token_weights, ignore_index, denominator, class_weights)
    refuse_forward_mode(student_logits)
    student_logits, lead, teacher, positions = flatten(student_logits, Teacher(teacher_logits, ids=teacher_ids), positions)
    student_logits, teacher_logits = check_logits(student_logits, teacher.logits, options, sharded=shard is not None)
    if in_place and 0 in student_logits.stride():
        raise ValueError("in_place: student_logits is an expanded view, whose positions share memory; make it contiguous")
    dtype = accumulation_dtype(student_logits, teacher_logits)
    teacher = teacher._replace(logits=teacher_logits)
    problem = _problem(student_logits, student_logits.shape[1], dtype, teacher, positions, options, shard)
    return unflatten(ops.logits(student_logits, problem, in_place), lead)


def _linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Teacher,
    positions: Positions,
    options: LossOptions | None,
    shard: VocabularyShard | None,
) -> LossResult:
    options = LossOptions() if options is None else options
    refuse_forward_mode(hidden, weight, bias)
    hidden, weight, bias, teacher, shard = split_head(hidden, weight, bias, teacher, shard)
    hidden, lead, teacher, positions = flatten(hidden, teacher, positions)
    device, sharded = hidden.device, shard is not None
    check_rows("hidden", hidden, (None, None), device)
    check_rows("weight", weight, (None, hidden.shape[1]), device)
    rows, common = hidden.shape[0], weight.shape[0]
    if (teacher.hidden is None) != (teacher.weight is None):
        missing = "teacher_hidden" if teacher.hidden is None else "teacher_weight"
        raise ValueError(f"{missing}: teacher_hidden and teacher_weight go together; give both")
    if teacher.bias is not None and teacher.weight is None:
        raise ValueError("teacher_bias: has no meaning without teacher_weight; leave it out")
    if bias is not None:
        check_rows("bias", bias, (common,), bias.device)
    if teacher.weight is not None and teacher.hidden is not None:
        check_rows("teacher_hidden", teacher.hidden, (rows, None), device)
        check_rows("teacher_weight", teacher.weight, (None, teacher.hidden.shape[1]), device)
        if teacher.bias is not None:
            check_rows("teacher_bias", teacher.bias, teacher.weight.shape[:1], teacher.bias.device)
        common = common_classes("teacher_weight", teacher.weight.shape[0], common, options, sharded=sharded)
    if teacher.logits is not None:
        check_rows("teacher_logits", teacher.logits, (rows, None), device)
        common = common_classes("teacher_logits", teacher.logits.shape[1], common, options, sharded=sharded)
    if options.common_vocabulary:
        weight, bias, teacher = weight[:common], None if bias is None else bias[:common], teacher.first(common)
    dtype = accumulation_dtype(hidden, weight, bias, teacher.hidden, teacher.weight, teacher.logits)
    product = options.product_dtype
    if product is None and torch.is_autocast_enabled(device.type) and dtype == torch.float32:
        product = torch.get_autocast_dtype(device.type)
    problem = _problem(hidden, common, dtype, teacher, positions, options, shard)
    return unflatten(ops.linear(hidden, weight, bias, replace(problem, product_dtype=product)), lead)


def _problem(
    student: Tensor,
    classes: int,
    dtype: torch.dtype,
    teacher: Teacher,
    positions: Positions,
    options: LossOptions,
    shard: VocabularyShard | None,
) -> Problem:
    if shard is not None:
        shard.check(classes)
        for name in ("teacher_top_p", "student_top_k"):
            if getattr(options, name) is not None:
                raise ValueError(f"{name}: ranks all classes, cannot be combined with a vocabulary shard; leave it out")
    total = classes if shard is None else shard.total
    targets = make_targets(student, dtype, options, teacher, positions, classes=total)
    logits, hidden, weight, bias = (None if tensor is None else tensor.detach() for tensor in teacher[:4])
    return Problem(targets, dtype, options, logits, hidden, weight, bias, shard)
