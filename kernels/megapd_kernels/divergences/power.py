"""The alpha-beta divergence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Divergence, Element, register


@register
@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """sum_j (alpha q^(alpha + beta) + beta p^(alpha + beta) - (alpha + beta) q^alpha p^beta) / (alpha beta (alpha + beta)).

    Cichocki, Cruces and Amari 2011; "ABKD", arXiv 2505.04560. alpha, beta above 0; it tends to the forward KL at (1, 0) and to
    the reverse KL at (0, 1). u = (p^(alpha + beta) - q^alpha p^beta) / alpha.
    """

    alpha: float = 0.2
    beta: float = 0.7

    name = "alpha_beta"
    needs_rest = "is not a sum over the rest's mass where the teacher has none"

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: of alpha_beta must be above 0 and finite, got {getattr(self, name)}; at 0 choose a KL")

    def terms(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        a, b = self.alpha, self.beta
        mixed = (a * log_q + b * log_p).exp()
        return (a * ((a + b) * log_q).exp() + b * ((a + b) * log_p).exp() - (a + b) * mixed) / (a * b * (a + b))

    def slopes(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
        a, b = self.alpha, self.beta
        # q^alpha - p^alpha as a multiple of the larger: a small log ratio keeps its digits, a large one does not overflow.
        d = (log_p - log_q).nan_to_num_(nan=0.0)
        larger = torch.maximum(log_p, log_q)
        size = (a * larger + b * log_p).exp()
        return size * torch.expm1(-a * d.abs()).mul_(torch.sign(d)).mul_(-1.0 / a)

    def element(self) -> Element:
        from .triton import alpha_beta

        return Element(alpha_beta)
