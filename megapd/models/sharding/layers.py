"""Layers of which a rank holds a part, and the sums over the ranks that make their outputs whole; for inference alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


class RowwiseLinear(nn.Module):
    """A linear layer of which this rank has some input features: weight [out, in / ranks], bias [out] or None."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.weight, self.bias, self.group = weight, bias, group
        self._sum = untraced(sum_over_ranks)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's input features [.., in / ranks] -> [.., out], equal on all ranks."""
        summed: Tensor = self._sum(F.linear(x, self.weight), self.group)
        return summed if self.bias is None else summed + self.bias


class VocabularyEmbedding(nn.Module):
    """An embedding of which this rank has some rows, from `start` on; first, last: whether it is the first or the last rank."""

    def __init__(
        self, weight: nn.Parameter, num_embeddings: int, start: int, first: bool, last: bool, group: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        self.weight, self.group = weight, group
        self.num_embeddings, self.embedding_dim = num_embeddings, weight.shape[1]
        self.start, self.first, self.last = start, first, last
        self._sum = untraced(_all_reduce)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [..] int64 -> [.., D], equal on all ranks."""
        rows = ids - self.start
        # Ids that no rank has are left to the outer ranks, where the lookup fails as it would in the whole table.
        other = torch.zeros_like(rows, dtype=torch.bool)
        if not self.first:
            other |= rows < 0
        if not self.last:
            other |= rows >= self.weight.shape[0]
        found = F.embedding(rows.masked_fill_(other, 0), self.weight).masked_fill_(other[..., None], 0.0)
        self._sum(found, self.group)
        return found


@cache
def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which torch.compile leaves out of its graphs; made when a layer is, for it imports dynamo, which takes
    seconds."""
    disabled: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def _all_reduce(x: Tensor, group: dist.ProcessGroup | None) -> None:
    """All but one rank have zeros, so the order in which the library adds does not matter."""
    dist.all_reduce(x, group=group)


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over ranks, each element summed in rank order on one rank: the same bits everywhere, and in every run.

    An all_reduce adds in an order that the library chooses by size and topology, and rounds a half-precision sum at every
    hop, where this rounds once. Like a ring's, each rank sends 2 (R - 1) / R of the tensor.
    """
    ranks = dist.get_world_size(group)
    flat = x.reshape(-1)
    share = -(-flat.numel() // ranks)
    flat = F.pad(flat, (0, share * ranks - flat.numel()))
    parts = torch.empty_like(flat)
    dist.all_to_all_single(parts, flat, group=group)
    dist.all_gather(list(flat.view(ranks, share).unbind()), parts.view(ranks, share).sum(0), group=group)
    return flat[: x.numel()].view(x.shape)
