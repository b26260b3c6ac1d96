"""What a divergence is, their names, and weighted sums of them.

A divergence of p and q, the student's and the teacher's softmax over V classes, is a function of one sum over the classes,

    D = value(S),    S = sum_j t(log p_j, log q_j)

With u_j = dt/dlog p_j, and log p the log softmax of the scaled logits a, so that dlog p_i / da_j = [i = j] - p_j,

    dD/da_j = value'(S) (u_j - p_j sum_i u_i)

and u + c p for any constant c gives the same: an author leaves out of u what would cancel digits. So a divergence is t and u, and
value and value' where it is not the sum itself: in torch, and if it is to run in Triton, as a function of one element there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

# Stands for log 0 where it is multiplied by a probability that is exactly 0: exp(-1e4) is 0 in float64.
LOG_ZERO = -1e4

# Beyond this |log p - log q|, the smaller of the two probabilities is below 1e-34 of the larger: no sum of either type sees it,
# while expm1 of more than 88 would overflow float32.
MAX_LOG_RATIO = 80.0

Total = Callable[[Tensor], Tensor]
Three = tuple[Tensor, Tensor, Tensor]


class Element(NamedTuple):
    """A divergence in Triton: functions decorated with triton.jit.

    term     (log_p, log_q, p, q, x, y, z) -> (t, u) of one class; x, y, z: the divergence's parameters in order, 0 beyond them
    slope    S -> value'(S); None: 1
    online   0, or for megapd_kernels' own: the number of the sum that the first sweep accumulates, see rows/triton_dense.py
    """

    term: Any
    slope: Any = None
    online: int = 0


class Divergence(ABC):
    """Subclasses are frozen dataclasses whose fields are at most three float parameters, decorated with `register`.

    name          what options and messages call it
    needs_rest    empty, or why a teacher without mass outside few classes has no meaning for it: "is infinite where ..."
    from_support  whether it is a sum over the teacher's classes alone: conventions support and sampled
    nonnegative   rounding below 0 is lifted
    scratch       further buffers [C, V] that `rows` takes
    """

    name: ClassVar[str]
    needs_rest: ClassVar[str] = ""
    from_support: ClassVar[bool] = False
    nonnegative: ClassVar[bool] = True
    scratch: ClassVar[int] = 1

    @abstractmethod
    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """t [C, V] of log probabilities [C, V] that may be -inf; differentiable in log_p, finite where 0 log 0 occurs."""

    @abstractmethod
    def slopes(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
        """u [C, V], up to a multiple of p that is constant in a row; p, q: the exponentials of the others."""

    def value(self, total: Tensor) -> Tensor:
        """D [C] of the sums [C]."""
        return total

    def value_slope(self, total: Tensor) -> Tensor | None:
        """value' [C] of the sums [C]; None: 1."""
        return None

    def element(self) -> Element | None:
        """Its Triton, imported here; None: its rows are computed by torch on any device."""
        return None

    def rows(self, log_p: Tensor, log_q: Tensor, free: list[Tensor], total: Total) -> Three:
        """(D [C], dD/da [C, V], p [C, V]) in plain torch; may overwrite log_p, log_q and the buffers in free [C, V].

        total adds the other ranks' parts to sums over this rank's classes.
        """
        p, q = torch.exp(log_p, out=free[0]), log_q.exp()
        terms = self.terms(log_p, log_q)
        g = self.slopes(log_p, log_q, p, q)
        first, second = total(torch.stack([terms.sum(1), g.sum(1)])).unbind()
        value = self.value(first)
        # 0 * D keeps a NaN of either side where the slopes leave it out.
        g = g.addcmul_(p, (second + 0.0 * value)[:, None], value=-1.0)
        slope = self.value_slope(first)
        if slope is not None:
            g *= slope[:, None]
        return value.clamp(min=0.0) if self.nonnegative else value, g, p

    @property
    def parameters(self) -> tuple[float, ...]:
        return tuple(float(getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]

    def __mul__(self, weight: float) -> Mixture:
        return Mixture(((float(weight), self),))

    __rmul__ = __mul__

    def __add__(self, other: Divergence | Mixture) -> Mixture:
        return 1.0 * self + other


@dataclass(frozen=True)
class Mixture:
    """A weighted sum of divergences, `0.7 * ForwardKL() + 0.3 * ReverseKL()`: one pass over the logits for all of them.

    Raises ValueError for no member or a weight that is not above 0 and finite.
    """

    members: tuple[tuple[float, Divergence], ...]

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("divergence: a weighted sum needs at least one member")
        for weight, member in self.members:
            if not 0.0 < weight < math.inf:
                raise ValueError(
                    f"divergence: the weight of {member.name} must be above 0 and finite, got {weight}; leave it out"
                )

    @property
    def name(self) -> str:
        if len(self.members) == 1 and self.members[0][0] == 1.0:
            return self.members[0][1].name
        return " + ".join(f"{weight:g} {member.name}" for weight, member in self.members)

    @property
    def needs_rest(self) -> str:
        return next((f"{member.name} {member.needs_rest}" for _, member in self.members if member.needs_rest), "")

    @property
    def from_support(self) -> bool:
        return all(member.from_support for _, member in self.members)

    @property
    def scratch(self) -> int:
        return max(member.scratch for _, member in self.members)

    def rows(self, log_p: Tensor, log_q: Tensor, free: list[Tensor], total: Total) -> tuple[Tensor, Tensor, Tensor]:
        """(D_k [M, C] of each member, unweighted; the weighted sum's dD/da [C, V]; p [C, V]), as Divergence.rows."""
        values, gradient = [], None
        for weight, member in self.members[:-1]:
            value, g, _ = member.rows(log_p.clone(), log_q.clone(), [buffer.clone() for buffer in free], total)
            values.append(value)
            gradient = g.mul_(weight) if gradient is None else gradient.add_(g, alpha=weight)
        weight, member = self.members[-1]
        value, g, p = member.rows(log_p, log_q, free, total)
        if weight != 1.0:
            g.mul_(weight)
        return torch.stack([*values, value]), g if gradient is None else g.add_(gradient), p

    def total(self, values: Tensor) -> Tensor:
        """The weighted sum over the first dimension, of the members' values."""
        if len(self.members) == 1 and self.members[0][0] == 1.0:
            return values[0]
        out = torch.zeros_like(values[0])
        for (weight, _), value in zip(self.members, values, strict=True):
            out = out + weight * value
        return out

    def __add__(self, other: Divergence | Mixture) -> Mixture:
        return Mixture(self.members + (other.members if isinstance(other, Mixture) else ((1.0, other),)))

    def __mul__(self, weight: float) -> Mixture:
        return Mixture(tuple((weight * each, member) for each, member in self.members))

    __rmul__ = __mul__


NAMES: dict[str, type[Divergence]] = {}
_Class = TypeVar("_Class", bound=type[Divergence])


def register(divergence: _Class) -> _Class:
    """Make a divergence known by its name: options take it, and compiled operations carry it by name and parameters.

    Raises ValueError for a name that another class has, or for more than three parameters.
    """
    name = divergence.name
    if NAMES.get(name, divergence).__qualname__ != divergence.__qualname__:
        raise ValueError(f"divergence: {name!r} is the name of {NAMES[name].__qualname__}; choose another")
    if len(fields(divergence)) > 3:  # type: ignore[arg-type]
        raise ValueError(f"divergence: {name} has more than three parameters")
    NAMES[name] = divergence
    return divergence


def named(name: str, *parameters: float) -> Divergence:
    """A registered divergence. Raises ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"divergence: {name!r} is not one of {', '.join(NAMES)}")
    return NAMES[name](*parameters)


def floored(log_p: Tensor) -> Tensor:
    """log p with a finite log 0: a `where` after a product stops NaN in the value and not in the gradient."""
    return log_p.masked_fill(log_p == -torch.inf, LOG_ZERO)


def log_of(x: float, like: Tensor) -> Tensor:
    return torch.tensor(math.log(x), dtype=like.dtype, device=like.device)
