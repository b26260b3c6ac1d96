"""What a distillation loss is asked for and what it gives back."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import torch
from torch import Tensor

from .divergences import JSD, Divergence, Mixture, named

Reduction = Literal["mean", "none"]

# The reciprocal of a smaller temperature leaves the range of float32, and 0 * inf would turn the largest logit into NaN.
MIN_TEMPERATURE = 1e-30

# The fields that may change from step to step: numbers that decide no shape.
NUMBERS = (
    "teacher_temperature",
    "student_temperature",
    "alpha",
    "label_smoothing",
    "z_loss",
    "logit_scale",
    "soft_cap",
    "teacher_logit_scale",
    "teacher_soft_cap",
    "teacher_top_p",
)

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

    divergence           a name, with the parameters' defaults; an object, JSD(0.3); or a weighted sum of objects,
                         0.7 * ForwardKL() + 0.3 * ReverseKL(), which the same pass computes. Names: forward_kl: KL(p_T || p_S);
                         reverse_kl: KL(p_S || p_T); jsd: see beta; tvd: half the L1 distance; soft_cross_entropy: forward_kl
                         plus the teacher's entropy, which changes no gradient; skewed_forward_kl, skewed_reverse_kl: against a
                         mixture of both sides; alpha_beta; lk: - log of the overlap. See divergences/
    teacher_temperature  0 is the exact limit: one-hot at the largest logit, the lowest index on ties
    student_temperature  above 0; it applies to the divergence alone
    alpha                the labels' share, in [0, 1]
    beta                 of the name jsd, in (0, 1): JSD = beta * KL(p_T || m) + (1 - beta) * KL(p_S || m), with
                         m = beta * p_T + (1 - beta) * p_S. It vanishes towards 0 and 1 and does not become a KL there, so both
                         ends are refused.
    label_smoothing      in [0, 1): CE is against (1 - label_smoothing) * one-hot + label_smoothing / V; infinite where a class
                         is banned
    z_loss               at least 0; pulls the softmax's normaliser, at temperature 1, towards 1 (PaLM: 1e-4); not scaled by alpha
    common_vocabulary    False: vocabularies of different sizes are refused; True: both softmaxes are those of the classes that
                         both sides have, the first min(V_S, V_T), as where one side is padded. Labels must lie below.
    reduction            mean: the sum over the denominator; none: the loss of each position times its weight, differentiable
                         with a gradient a position. The linear losses then form the logits again in backward, as for recompute
    per_token            also return what each position says: LossResult.tokens
    top_k_agreement      k above 0: with per_token, the share of the teacher's top k classes that are in the student's top k
    logit_scale          above 0: the student's logits are multiplied by it, z = logit_scale * s (Cohere), then capped
    soft_cap             above 0 or None: z = soft_cap * tanh(z / soft_cap) (Gemma 2). A banned class stays banned: -inf
    teacher_logit_scale, teacher_soft_cap   the same of a dense teacher's
    teacher_top_p        in (0, 1] or None: a dense teacher's nucleus, the fewest classes of largest probability that hold this
                         mass, renormalised (Holtzman et al., 2020); not where the divergence needs the other classes
    student_top_k        at least 1 or None: a dense teacher is compared on the student's K largest logits and one bucket for
                         the rest, exact mass on both sides; with reverse_kl, what on-policy distillation uses
    product_dtype        of the operands of the linear losses' products, whose results are float32; None: autocast's where it
                         is on, else the inputs' common type. A CPU has no such product: it rounds them and multiplies in float32
    recompute            linear losses: False: the gradient is computed in forward and kept; True: the logits are formed again in
                         backward, and between the two nothing of the size of the weight is held
    chunk_bytes          most bytes of full-precision logits alive at once; at least one row is always computed.
                         None: 64 MiB on a CPU, 2 GiB elsewhere

    Raises ValueError that names the field.
    """

    divergence: str | Divergence | Mixture = "forward_kl"
    teacher_temperature: float = 1.0
    student_temperature: float = 1.0
    alpha: float = 0.0
    beta: float = 0.5
    scale_t2: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    common_vocabulary: bool = False
    reduction: Reduction = "mean"
    per_token: bool = False
    top_k_agreement: int = 0
    logit_scale: float = 1.0
    soft_cap: float | None = None
    teacher_logit_scale: float = 1.0
    teacher_soft_cap: float | None = None
    teacher_top_p: float | None = None
    student_top_k: int | None = None
    product_dtype: torch.dtype | None = None
    recompute: bool = False
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        teacher, student = self.teacher_temperature, self.student_temperature
        if not (teacher == 0.0 or MIN_TEMPERATURE <= teacher < math.inf):
            raise ValueError(f"teacher_temperature: must be 0 (argmax) or at least {MIN_TEMPERATURE}, got {teacher}")
        if not MIN_TEMPERATURE <= student < math.inf:
            raise ValueError(f"student_temperature: must be at least {MIN_TEMPERATURE}, got {student}")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha: must lie in [0, 1], got {self.alpha}")
        JSD(self.beta)
        mixture = self.mixture
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing: must lie in [0, 1), got {self.label_smoothing}")
        if not 0.0 <= self.z_loss < math.inf:
            raise ValueError(f"z_loss: must be finite and at least 0, got {self.z_loss}")
        if self.chunk_bytes is not None and self.chunk_bytes < 1:
            raise ValueError(f"chunk_bytes: must be at least 1, got {self.chunk_bytes}")
        if mixture.needs_rest and teacher == 0.0:
            raise ValueError(f"teacher_temperature: {mixture.needs_rest}, as an argmax teacher; raise it above 0")
        self._check_shape()
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"reduction: {self.reduction!r} is not one of {', '.join(get_args(Reduction))}")
        if self.top_k_agreement < 0 or (self.top_k_agreement > 0 and not self.per_token):
            raise ValueError(f"top_k_agreement: needs per_token=True and at least 0, got {self.top_k_agreement}")
        if self.teacher_top_p is not None:
            if not 0.0 < self.teacher_top_p <= 1.0:
                raise ValueError(f"teacher_top_p: must lie in (0, 1], got {self.teacher_top_p}")
            if mixture.needs_rest:
                raise ValueError(f"teacher_top_p: {mixture.needs_rest}; choose another divergence or leave it out")
        if self.student_top_k is not None:
            if self.student_top_k < 1:
                raise ValueError(f"student_top_k: must be at least 1, got {self.student_top_k}")
            if teacher == 0.0 or self.teacher_top_p is not None:
                raise ValueError(
                    "student_top_k: needs the teacher's whole softmax; leave teacher_top_p out and raise the temperature"
                )
        numbers = [getattr(self, name) for name in NUMBERS]
        members = [(weight, *member.parameters) for weight, member in mixture.members]
        flat = [math.nan if number is None else number for number in numbers] + [each for member in members for each in member]
        object.__setattr__(self, "_numbers", torch.tensor(flat, dtype=torch.float64, device="cpu"))
        object.__setattr__(self, "_whole", teacher > 0 and self.teacher_top_p is None and self.student_top_k is None)
        if self.product_dtype is not None and not self.product_dtype.is_floating_point:
            raise ValueError(f"product_dtype: must be a floating-point type, got {self.product_dtype}")

    def _check_shape(self) -> None:
        for name in ("logit_scale", "teacher_logit_scale"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be above 0 and finite, got {getattr(self, name)}")
        for name in ("soft_cap", "teacher_soft_cap"):
            cap = getattr(self, name)
            if cap is not None and not 0.0 < cap < math.inf:
                raise ValueError(f"{name}: must be above 0 and finite, got {cap}; None caps nothing")
        if self.shape > 0 and self.student_temperature < 1e-7:
            raise ValueError(
                f"student_temperature: must be at least 1e-7 beside logit_scale or soft_cap, got {self.student_temperature}"
            )

    @property
    def numbers(self) -> Tensor:
        """[NUMBERS, and of each divergence its weight and parameters] float64, on the CPU, NaN for None: as a tensor they can
        change without torch.compile compiling again."""
        found: Tensor = self._numbers  # type: ignore[attr-defined]
        return found

    @property
    def whole_teacher(self) -> bool:
        """Whether all classes of a dense teacher count, as they are."""
        found: bool = self._whole  # type: ignore[attr-defined]
        return found

    @property
    def mixture(self) -> Mixture:
        """The divergence as a weighted sum, of one member where it is one."""
        divergence = self.divergence
        if isinstance(divergence, str):
            divergence = JSD(self.beta) if divergence == "jsd" else named(divergence)
        return divergence if isinstance(divergence, Mixture) else Mixture(((1.0, divergence),))

    @property
    def shape(self) -> int:
        """What becomes of the student's logits: 0 nothing, 1 scaled, 2 scaled and capped."""
        return 2 if self.soft_cap is not None else int(self.logit_scale != 1.0)

    @property
    def teacher_shape(self) -> int:
        return 2 if self.teacher_soft_cap is not None else int(self.teacher_logit_scale != 1.0)

    @property
    def t2(self) -> float:
        """The factor of the divergence."""
        return self.student_temperature**2 if self.scale_t2 else 1.0


class TokenOutputs(NamedTuple):
    """What each position says, detached, in the shape of the positions; 0, and -1 for a class, where one does not count.

    divergences         [M, ...] of each member of the weighted sum, without its weight
    label_logprob       log p of the label at temperature 1; 0 without labels
    logsumexp           of the student's logits at temperature 1
    entropy             of p_S; teacher_entropy of p_T, 0 without a teacher: for one by ids, of the ids' and the rest's
                        probabilities as given
    argmax              int64, the lowest class on ties; teacher_argmax, -1 without a teacher
    agreement           bool, whether both are the same class
    top_k_agreement     the share of the teacher's top k that are in the student's; 0 where it is not asked for
    """

    divergences: Tensor
    label_logprob: Tensor
    logsumexp: Tensor
    entropy: Tensor
    teacher_entropy: Tensor
    argmax: Tensor
    teacher_argmax: Tensor
    agreement: Tensor
    top_k_agreement: Tensor


class LossResult(NamedTuple):
    """Scalars, float32 (float64 where an input is float64); sums run over the counted positions, w the token weights.

    loss           differentiable: sum_i w_i * loss_i / denominator; for reduction none each w_i * loss_i / denominator
    divergence     detached: sum_i w_i * D_i, without (1 - alpha) and t2; 0 without a teacher
    cross_entropy  detached: sum_i w_i * CE_i, without alpha and smoothing; 0 without labels
    correct        detached: sum_i w_i * [argmax of the student's logits = label], lowest index on ties; 0 without labels
    tokens         for per_token; else None
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    correct: Tensor
    tokens: TokenOutputs | None = None
