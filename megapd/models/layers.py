"""Layers whose weights collect a gradient from every token: on a CPU in half precision they sum it in fp32.

There torch adds the gradient of a layer norm's weights and of an embedding's rows up in bf16, where a sum stops growing once it
is 256 times what is added. Over 65,536 tokens a norm's weight gradient is off by 55 % and its bias's by 76 %, that of a table of
600 rows by 41 % (benchmarks/gradients.py). On a GPU torch sums in fp32 itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_HALF = (torch.bfloat16, torch.float16)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm; the result has the dtype of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        if not _sums_in_half(self.weight):
            return super().forward(x)
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class Embedding(nn.Embedding):
    """nn.Embedding."""

    def forward(self, ids: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and _sums_in_half(self.weight)):
            return super().forward(ids)
        return F.embedding(ids, self.weight.float()).to(self.weight.dtype)


def _sums_in_half(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in _HALF
