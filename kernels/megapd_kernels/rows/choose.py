"""Which implementation serves a tensor: the only place that decides."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, get_args

import torch

from ..options import known_names
from .base import Problem, RowLoss
from .torch import TorchRows

Implementation = Literal["torch", "triton"]


@known_names
def implementation(device: torch.device, dtype: torch.dtype) -> Implementation:
    """triton on a GPU (CUDA or HIP) for sums in float32, torch elsewhere; MEGAPD_KERNELS=torch or triton overrides.

    Raises ValueError for another value of MEGAPD_KERNELS.
    """
    asked = os.environ.get("MEGAPD_KERNELS", "auto")
    if asked not in ("auto", *get_args(Implementation)):
        raise ValueError(f"MEGAPD_KERNELS: {asked!r} is not auto, torch or triton")
    if dtype != torch.float32:
        return "torch"
    if asked == "auto":
        return "triton" if device.type == "cuda" and importlib.util.find_spec("triton") is not None else "torch"
    return "triton" if asked == "triton" else "torch"


def make_rows(
    problem: Problem, n: int, v: int, device: torch.device, *, grad: bool, gradient_dtype: torch.dtype | None = None
) -> RowLoss:
    """The row losses of n positions and v classes. gradient_dtype: a type that the gradient may come in; default the sums'."""
    if implementation(device, problem.dtype) == "triton":
        from .triton import TritonRows

        return TritonRows(problem, n, v, device, grad=grad, gradient_dtype=gradient_dtype or problem.dtype)
    return TorchRows(problem, n, v, device, grad=grad)
