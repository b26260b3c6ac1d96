"""Part: what a rank needs of a stored tensor, read without the rest of it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranges:
    """Rows (dim 0) or columns (dim 1) [start, stop) of a tensor, put together in order."""

    dim: int
    ranges: tuple[tuple[int, int], ...]

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        length = sum(stop - start for start, stop in self.ranges)
        return (*whole[: self.dim], length, *whole[self.dim + 1 :])


@dataclass(frozen=True)
class Flat:
    """Elements [start, stop) of the flattened tensor; both may lie beyond its end, where there is nothing."""

    start: int
    stop: int

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        size = prod(whole)
        return (min(self.stop, size) - min(self.start, size),)


Part = Ranges | Flat | None  # None: the whole tensor


def take(source: Any, part: Part) -> Tensor:
    """The part of a tensor, or of a slice of an open safetensors file (safe_open(..).get_slice), of which only the rows, or the
    columns, that are needed are read."""
    shape = tuple(source.shape if isinstance(source, Tensor) else source.get_shape())
    if part is None or not shape:
        whole = source if isinstance(source, Tensor) else source[...] if not shape else source[:]
        return whole if not isinstance(part, Flat) else whole.reshape(-1)[part.start : part.stop]
    if isinstance(part, Ranges):
        pieces = [source[start:stop] if part.dim == 0 else source[:, start:stop] for start, stop in part.ranges]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, part.dim)
    row = max(1, prod(shape[1:]))
    first, last = part.start // row, -(-min(part.stop, row * shape[0]) // row)
    if first >= last:
        nothing: Tensor = source[0:0].reshape(-1)
        return nothing
    offset = part.start - first * row
    found: Tensor = source[first:last].reshape(-1)[offset : offset + part.stop - part.start]
    return found
