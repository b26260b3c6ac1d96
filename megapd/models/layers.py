"""What the families share: blocks, and layers whose weights collect a gradient from every token, which on a CPU
in half precision sum it in fp32.

There torch adds the gradient of a layer norm's weights and of an embedding's rows up in bf16, where a sum stops growing once it
is 256 times what is added. Over 65,536 tokens a norm's weight gradient is off by 55 % and its bias's by 76 %, that of a table of
600 rows by 41 % (benchmarks/gradients.py). On a GPU torch sums in fp32 itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_HALF = (torch.bfloat16, torch.float16)


class Block(nn.Module, ABC):
    """What a transformer repeats. With `compiled`, torch.compile takes each block as a graph.

    It is compiled below __call__: the block's own hooks (ZeRO-3's, if blocks are its leaves) stay outside the graph, and since
    parameters are inputs of the graph, all blocks share one compilation.
    """

    compiled = False

    @abstractmethod
    def layer(self, x: Tensor, *others: Any) -> Tensor:
        """Hidden states [B, L, D], and what else the family's blocks need -> [B, L, D]."""

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        return (_compiled(type(self)) if self.compiled else type(self).layer)(self, x, *others)


@cache
def _compiled(kind: type[Block]) -> Callable[..., Tensor]:
    """One for all blocks of a kind in the process, so that they share its compilations; made when the first one is to run, for
    torch.compile imports dynamo and inductor, which takes seconds."""
    return torch.compile(kind.layer)


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, *others: Any, checkpointing: bool) -> Tensor:
    """One after the other; checkpointing: each keeps its input alone, and computes the rest again in backward."""
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            # Without random numbers in the blocks there is no generator state to keep.
            x = checkpoint(block, x, *others, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, *others)
    return x


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm; the result has the dtype of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        if not _sums_in_half(self.weight):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), bias, self.eps).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm (Zhang and Sennrich 2019) with its sum of squares in fp32, as Llama's; the result has the dtype of what it is
    given."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in _HALF:
            return super().forward(x)
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class Embedding(nn.Embedding):
    """nn.Embedding."""

    def forward(self, ids: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and _sums_in_half(self.weight)):
            return super().forward(ids)
        return F.embedding(ids, self.weight.float()).to(self.weight.dtype)


def _sums_in_half(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in _HALF
