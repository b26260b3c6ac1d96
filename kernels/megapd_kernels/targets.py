"""What a loss is of: the positions, their labels and weights, the teacher, and the checks that every implementation shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .options import LossOptions
from .sparse import Convention, SparseTeacher, one_hot_teacher, sparse_teacher


class Teacher(NamedTuple):
    """The arguments teacher_* and convention as they were given: at most one form of teacher."""

    logits: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    ids: Tensor | None = None
    logprobs: Tensor | None = None
    log_rest: Tensor | None = None
    convention: Convention | None = None

    def first(self, classes: int) -> Teacher:
        """A dense teacher's first classes."""
        logits = None if self.logits is None else self.logits[:, :classes]
        weight, bias = (None if tensor is None else tensor[:classes] for tensor in (self.weight, self.bias))
        return self._replace(logits=logits, weight=weight, bias=bias)


class Positions(NamedTuple):
    """The arguments that describe the N positions and their sum as they were given."""

    labels: Tensor | None
    token_weights: Tensor | None
    ignore_index: int
    denominator: Tensor | float | None
    class_weights: Tensor | None = None


class Targets(NamedTuple):
    """Checked targets of N positions, each None where it was not given.

    labels       [N] int64, 0 where not counted
    sparse       a teacher given by ids
    counted      [N] bool; None: every position counts
    weights      [N] of the accumulation type; 0 where not counted; None: all 1
    denominator  0-dim of the accumulation type
    label_weights  [N] of the accumulation type, the class weight of each label; None: all 1
    """

    labels: Tensor | None
    sparse: SparseTeacher | None
    counted: Tensor | None
    weights: Tensor | None
    denominator: Tensor
    label_weights: Tensor | None = None


def make_targets(
    student: Tensor, dtype: torch.dtype, options: LossOptions, teacher: Teacher, positions: Positions, *, classes: int
) -> Targets:
    """Check what comes with the positions and bring it into the form that the implementations use, without a host sync.

    student: hidden states or logits, of which the rows and the device count; classes: of all ranks. A dense teacher's tensors are
    not looked at. Raises ValueError that names the argument.
    """
    rows, device = student.shape[0], student.device
    labels, token_weights, ignore_index, denominator, class_weights = positions
    teachers = sum(form is not None for form in (teacher.logits, teacher.hidden, teacher.ids))
    if teachers > 1:
        raise ValueError("teacher_logits, teacher_hidden, teacher_ids: give at most one form of the teacher")
    if labels is None and teachers == 0:
        raise ValueError("labels: needed where no teacher is given")
    if labels is None and options.alpha > 0:
        raise ValueError(f"labels: needed for alpha = {options.alpha}; give them or set alpha to 0")
    if labels is not None:
        check_rows("labels", labels, (rows,), device, (torch.int64, torch.int32))
        labels = labels.long()
    if token_weights is not None:
        check_rows("token_weights", token_weights, (rows,), device, MASKS)

    counted = None if labels is None else labels != ignore_index
    weights = None if token_weights is None else token_weights.detach().to(dtype)
    if weights is not None:
        # A weight of 0 masks like ignore_index: 0 * NaN of a padded position must not reach the sums.
        heavy = weights != 0
        counted = heavy if counted is None else counted & heavy
        weights = weights.masked_fill(~counted, 0.0)
    elif counted is not None:
        weights = counted.to(dtype)
    if counted is not None and labels is not None:
        labels = labels.masked_fill(~counted, 0)

    label_weights = None
    if class_weights is not None:
        check_rows("class_weights", class_weights, (classes,), device)
        if labels is None:
            raise ValueError("class_weights: weigh the labels' cross entropy; give labels or leave them out")
        if options.label_smoothing > 0:
            raise ValueError("class_weights: cannot be combined with label_smoothing; set one of them")
        label_weights = class_weights.detach().to(dtype)[labels]

    sparse = _teacher_by_ids(student, dtype, options, teacher, counted, classes)
    if denominator is None:
        each = weights
        if teachers == 0 and label_weights is not None:  # as torch's cross_entropy
            each = label_weights if weights is None else weights * label_weights
        alone = options.reduction == "none"
        total = torch.full((), 1.0 if alone else float(rows), dtype=dtype, device=device) if alone or each is None else each.sum()
    elif isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator: expected one number, got shape {tuple(denominator.shape)}")
        total = denominator.detach().to(device=device, dtype=dtype).reshape(())
    else:
        if not 0.0 <= denominator < math.inf:
            raise ValueError(f"denominator: must be finite and not negative, got {denominator}")
        total = torch.full((), float(denominator), dtype=dtype, device=device)
    return Targets(labels, sparse, counted, weights, total, label_weights)


def _teacher_by_ids(
    student: Tensor, dtype: torch.dtype, options: LossOptions, teacher: Teacher, counted: Tensor | None, classes: int
) -> SparseTeacher | None:
    rows, device = student.shape[0], student.device
    ids, logprobs, log_rest, convention = teacher[4:]
    if ids is None:
        if logprobs is not None or convention is not None or log_rest is not None:
            raise ValueError(
                "teacher_logprobs, convention, teacher_log_rest: have no meaning without teacher_ids; leave them out"
            )
        return None
    check_rows("teacher_ids", ids, (rows, None)[: max(1, ids.dim())], device, (torch.int64, torch.int32))
    ids = ids.long()
    if logprobs is not None:
        check_rows("teacher_logprobs", logprobs, tuple(ids.shape), device)
    if log_rest is not None:
        check_rows("teacher_log_rest", log_rest, (rows,), device)
        log_rest = log_rest.detach().to(dtype)
    if logprobs is not None:
        return sparse_teacher(ids, logprobs.detach(), log_rest, convention, options, dtype, counted, classes)
    if ids.dim() != 1:
        raise ValueError(f"teacher_logprobs: needed with teacher_ids of shape {tuple(ids.shape)}; give [N, K]")
    if convention is not None or log_rest is not None:
        raise ValueError("convention, teacher_log_rest: have no meaning without teacher_logprobs; leave them out")
    if options.mixture.needs_rest:
        raise ValueError(f"teacher_ids: {options.mixture.needs_rest}, as a one-hot teacher; choose another divergence")
    return one_hot_teacher(ids if counted is None else ids.masked_fill(~counted, 0), dtype)


MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def reciprocal_or_zero(denominator: Tensor) -> Tensor:
    """1 / denominator, and 0 for 0: a batch in which nothing counts has loss 0 and gradients 0."""
    return torch.where(denominator == 0, torch.zeros_like(denominator), denominator.reciprocal())


def check_rows(
    name: str, tensor: Tensor, shape: Sequence[int | None], device: torch.device, dtypes: Sequence[torch.dtype] = ()
) -> None:
    """Raise ValueError unless `tensor` has the shape (None: any size) on `device`, and one of dtypes, for none floating."""
    fits = tensor.dim() == len(shape) and all(want in (None, got) for want, got in zip(shape, tensor.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(tensor.shape)}")
    if (not dtypes or dtypes == MASKS) and not (tensor.is_floating_point() or tensor.dtype in dtypes):
        raise ValueError(f"{name}: expected a floating-point type{', a bool or int mask' if dtypes else ''}, got {tensor.dtype}")
    if dtypes and dtypes != MASKS and tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: is on {tensor.device}, the student on {device}")


def check_logits(
    student: Tensor, teacher: Tensor | None, options: LossOptions, *, sharded: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Raise ValueError unless the student's and the teacher's logits fit each other; both, of the classes that are to count."""
    check_rows("student_logits", student, (None, None), student.device)
    if teacher is None:
        return student, None
    check_rows("teacher_logits", teacher, (student.shape[0], None), student.device)
    common = common_classes("teacher_logits", teacher.shape[1], student.shape[1], options, sharded=sharded)
    return (student[:, :common], teacher[:, :common]) if options.common_vocabulary else (student, teacher)


def common_classes(name: str, teacher: int, student: int, options: LossOptions, *, sharded: bool) -> int:
    """How many classes count. Raises ValueError where the vocabularies differ and options do not say that the common ones do:
    padding the teacher's silently would give the padding probability."""
    if not options.common_vocabulary and teacher != student:
        raise ValueError(
            f"{name}: the teacher has {teacher} classes, the student {student}; both need the same vocabulary, or "
            "common_vocabulary=True to use the classes that both have"
        )
    if options.common_vocabulary and sharded:
        raise ValueError("common_vocabulary: cannot be combined with a vocabulary shard; cut both heads to the same classes")
    return min(teacher, student)


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where an input is, else float32. A teacher's log probabilities are no such input."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
