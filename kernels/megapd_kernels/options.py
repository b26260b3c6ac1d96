"""What a distillation loss is asked for, what it gives back, and the checks that every implementation shares."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import torch
from torch import Tensor

from .sparse import Convention, SparseTeacher, one_hot_teacher, sparse_teacher

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tvd", "soft_cross_entropy"]

# The reciprocal of a smaller temperature leaves the range of float32, and 0 * inf would turn the largest logit into NaN.
MIN_TEMPERATURE = 1e-30

_Callee = TypeVar("_Callee", bound=Callable[..., Any])


def known_names(callee: _Callee) -> _Callee:
    """A function or class whose TypeError for an unknown argument offers the nearest names; its signature stays."""
    if isinstance(callee, type):
        callee.__init__ = known_names(callee.__init__)  # type: ignore[misc]
        return callee
    known = tuple(name for name in inspect.signature(callee).parameters if name != "self")

    @functools.wraps(callee)
    def checked(*arguments: Any, **named: Any) -> Any:
        for name in named:
            if name not in known:
                raise TypeError(f"{callee.__qualname__}() got an unexpected keyword argument {name!r}; {_offer(name, known)}")
        return callee(*arguments, **named)

    return cast(_Callee, checked)


def _offer(name: str, known: tuple[str, ...]) -> str:
    spelt = {parameter: repr(parameter) for parameter in known}
    if "options" in known:
        spelt |= {field.name: f"options=LossOptions({field.name}=...)" for field in fields(LossOptions)}
    nearest = get_close_matches(name, spelt, n=2)
    return f"did you mean {' or '.join(spelt[near] for near in nearest)}?" if nearest else f"it takes {', '.join(known)}"


@known_names
@dataclass(frozen=True)
class LossOptions:
    """The loss of a token: alpha * CE(label, p) + (1 - alpha) * t2 * D(p_T, p_S) + z_loss * (log sum exp of the logits)^2.

    p_T and p_S are the softmax of the teacher's and the student's logits over their temperatures, p the softmax of the
    student's logits at temperature 1, and t2 = student_temperature ** 2 if scale_t2 (Hinton et al., 2015), else 1.

    divergence           forward_kl: KL(p_T || p_S); reverse_kl: KL(p_S || p_T); jsd: see beta; tvd: half the L1 distance;
                         soft_cross_entropy: forward_kl plus the teacher's entropy, which changes no gradient
    teacher_temperature  0 is the exact limit: one-hot at the largest logit, the lowest index on ties
    student_temperature  above 0; it applies to the divergence alone
    alpha                the labels' share, in [0, 1]
    beta                 in (0, 1): JSD = beta * KL(p_T || m) + (1 - beta) * KL(p_S || m), m = beta * p_T + (1 - beta) * p_S.
                         It vanishes towards 0 and 1 and does not become a KL there, so both ends are refused.
    label_smoothing      in [0, 1): CE is against (1 - label_smoothing) * one-hot + label_smoothing / V; infinite where a class
                         is banned
    z_loss               at least 0; pulls the softmax's normaliser, at temperature 1, towards 1 (PaLM: 1e-4); not scaled by alpha
    common_vocabulary    False: vocabularies of different sizes are refused; True: both softmaxes are those of the classes that
                         both sides have, the first min(V_S, V_T), as where one side is padded. Labels must lie below.
    recompute            linear losses: False: the gradient is computed in forward and kept; True: the logits are formed again in
                         backward, and between the two nothing of the size of the weight is held
    chunk_bytes          most bytes of full-precision logits alive at once; at least one row is always computed.
                         None: 64 MiB on a CPU, 2 GiB elsewhere

    Raises ValueError that names the field.
    """

    divergence: Divergence = "forward_kl"
    teacher_temperature: float = 1.0
    student_temperature: float = 1.0
    alpha: float = 0.0
    beta: float = 0.5
    scale_t2: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    common_vocabulary: bool = False
    recompute: bool = False
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.divergence not in get_args(Divergence):
            raise ValueError(f"divergence: {self.divergence!r} is not one of {', '.join(get_args(Divergence))}")
        teacher, student = self.teacher_temperature, self.student_temperature
        if not (teacher == 0.0 or MIN_TEMPERATURE <= teacher < math.inf):
            raise ValueError(f"teacher_temperature: must be 0 (argmax) or at least {MIN_TEMPERATURE}, got {teacher}")
        if not MIN_TEMPERATURE <= student < math.inf:
            raise ValueError(f"student_temperature: must be at least {MIN_TEMPERATURE}, got {student}")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha: must lie in [0, 1], got {self.alpha}")
        if not 0.0 < self.beta < 1.0:
            raise ValueError(f"beta: must lie strictly between 0 and 1, got {self.beta}; for the ends choose a KL")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing: must lie in [0, 1), got {self.label_smoothing}")
        if not 0.0 <= self.z_loss < math.inf:
            raise ValueError(f"z_loss: must be finite and at least 0, got {self.z_loss}")
        if self.chunk_bytes is not None and self.chunk_bytes < 1:
            raise ValueError(f"chunk_bytes: must be at least 1, got {self.chunk_bytes}")
        if self.divergence == "reverse_kl" and teacher == 0.0:
            raise ValueError("teacher_temperature: reverse_kl is infinite against an argmax teacher; raise it above 0")

    @property
    def t2(self) -> float:
        """The factor of the divergence."""
        return self.student_temperature**2 if self.scale_t2 else 1.0


class LossResult(NamedTuple):
    """Four scalars, float32 (float64 where an input is float64); sums run over the counted positions, w the token weights.

    loss           differentiable: sum_i w_i * loss_i / denominator
    divergence     detached: sum_i w_i * D_i, without (1 - alpha) and t2; 0 without a teacher
    cross_entropy  detached: sum_i w_i * CE_i, without alpha and smoothing; 0 without labels
    correct        detached: sum_i w_i * [argmax of the student's logits = label], lowest index on ties; 0 without labels
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    correct: Tensor


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


class Targets(NamedTuple):
    """Checked targets of N positions, each None where it was not given.

    labels       [N] int64, 0 where not counted
    sparse       a teacher given by ids
    counted      [N] bool; None: every position counts
    weights      [N] of the accumulation type; 0 where not counted; None: all 1
    denominator  0-dim of the accumulation type
    """

    labels: Tensor | None
    sparse: SparseTeacher | None
    counted: Tensor | None
    weights: Tensor | None
    denominator: Tensor


def make_targets(
    student: Tensor, dtype: torch.dtype, options: LossOptions, teacher: Teacher, positions: Positions, *, classes: int
) -> Targets:
    """Check what comes with the positions and bring it into the form that the implementations use, without a host sync.

    student: hidden states or logits, of which the rows and the device count; classes: of all ranks. A dense teacher's tensors are
    not looked at. Raises ValueError that names the argument.
    """
    rows, device = student.shape[0], student.device
    labels, token_weights, ignore_index, denominator = positions
    teachers = sum(form is not None for form in (teacher.logits, teacher.hidden, teacher.ids))
    if teachers > 1:
        raise ValueError("teacher_logits, teacher_hidden, teacher_ids: give at most one form of the teacher")
    if labels is None and teachers == 0:
        raise ValueError("labels: needed where no teacher is given")
    if labels is None and options.alpha > 0:
        raise ValueError(f"labels: needed for alpha = {options.alpha}; give them or set alpha to 0")
    if labels is not None:
        check_rows("labels", labels, (rows,), device, torch.int64)
    if token_weights is not None:
        check_rows("token_weights", token_weights, (rows,), device)

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

    sparse = _teacher_by_ids(student, dtype, options, teacher, counted, classes)
    if denominator is None:
        total = torch.full((), float(rows), dtype=dtype, device=device) if weights is None else weights.sum()
    elif isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator: expected one number, got shape {tuple(denominator.shape)}")
        total = denominator.detach().to(device=device, dtype=dtype).reshape(())
    else:
        if not 0.0 <= denominator < math.inf:
            raise ValueError(f"denominator: must be finite and not negative, got {denominator}")
        total = torch.full((), float(denominator), dtype=dtype, device=device)
    return Targets(labels, sparse, counted, weights, total)


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
    check_rows("teacher_ids", ids, (rows, None)[: max(1, ids.dim())], device, torch.int64)
    if logprobs is not None:
        check_rows("teacher_logprobs", logprobs, tuple(ids.shape), device)
    if log_rest is not None:
        check_rows("teacher_log_rest", log_rest, (rows,), device)
        log_rest = log_rest.detach().to(dtype)
    if logprobs is not None:
        logprobs, temperature = logprobs.detach().to(dtype), options.teacher_temperature
        return sparse_teacher(ids, logprobs, log_rest, convention, options.divergence, temperature, counted, classes)
    if ids.dim() != 1:
        raise ValueError(f"teacher_logprobs: needed with teacher_ids of shape {tuple(ids.shape)}; give [N, K]")
    if convention is not None or log_rest is not None:
        raise ValueError("convention, teacher_log_rest: have no meaning without teacher_logprobs; leave them out")
    if options.divergence == "reverse_kl":
        raise ValueError("teacher_ids: reverse_kl is infinite against a one-hot teacher; choose another divergence")
    return one_hot_teacher(ids if counted is None else ids.masked_fill(~counted, 0), dtype)


def reciprocal_or_zero(denominator: Tensor) -> Tensor:
    """1 / denominator, and 0 for 0: a batch in which nothing counts has loss 0 and gradients 0."""
    return torch.where(denominator == 0, torch.zeros_like(denominator), denominator.reciprocal())


def check_rows(
    name: str, tensor: Tensor, shape: Sequence[int | None], device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Raise ValueError unless `tensor` has the shape (None: any size) on `device`, and dtype, or for None a floating one."""
    fits = tensor.dim() == len(shape) and all(want in (None, got) for want, got in zip(shape, tensor.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(tensor.shape)}")
    if dtype is None and not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point type, got {tensor.dtype}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {tensor.dtype}")
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
    """float64 where an input is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
