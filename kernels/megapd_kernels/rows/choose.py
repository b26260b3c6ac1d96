"""Which implementation serves a tensor: the only place that decides."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, get_args

import torch

from ..divergences import Mixture
from ..options import known_names
from .base import Problem, RowLoss
from .torch import TorchRows

Implementation = Literal["torch", "triton"]


@known_names
def implementation(device: torch.device, dtype: torch.dtype, mixture: Mixture | None = None) -> Implementation:
    """triton on a GPU (CUDA or HIP) for sums in float32 and divergences that have Triton, torch elsewhere.

    MEGAPD_KERNELS=torch or triton overrides.

    Raises ValueError for another value of MEGAPD_KERNELS.
    """
    asked = os.environ.get("MEGAPD_KERNELS", "auto")
    if asked not in ("auto", *get_args(Implementation)):
        raise ValueError(f"MEGAPD_KERNELS: {asked!r} is not auto, torch or triton")
    if asked == "auto":
        asked = "triton" if device.type == "cuda" and importlib.util.find_spec("triton") is not None else "torch"
    if asked == "torch" or dtype != torch.float32:
        return "torch"
    return "triton" if mixture is None or all(each.element() is not None for _, each in mixture.members) else "torch"


def make_rows(
    problem: Problem, n: int, v: int, device: torch.device, *, grad: bool, gradient_dtype: torch.dtype | None = None
) -> RowLoss:
    """The row losses of n positions and v classes. gradient_dtype: a type that the gradient may come in; default the sums'."""
    if implementation(device, problem.dtype, problem.options.mixture) == "triton":
        from .triton import TritonRows

        return TritonRows(problem, n, v, device, grad=grad, gradient_dtype=gradient_dtype or problem.dtype)
    return TorchRows(problem, n, v, device, grad=grad)
