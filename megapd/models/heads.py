"""LossHead: the output layer and the loss as one module.

The fused loss never forms the logits, so it needs the output weight itself. Under ZeRO-3 that weight exists on a rank
only while the module that registers it runs, between the hooks of its __call__. Hence the module that owns the weight
calls the kernel, inside the model's forward: DeepSpeed gathers the weight before, reduces its gradient after, and no
other code touches it. A tied head registers the embedding's Parameter a second time; ZeRO counts it once.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapd.signals.signal import Signal
from megapd_kernels import LossOptions, LossResult, linear_distillation_loss


class LossHead(nn.Module):
    """Output layer, weight [V, D] and bias [V] or None, with the loss of its logits.

    embedding: the token embedding whose weight is shared (V its rows); None: a weight of its own, left uninitialised.
    """

    def __init__(
        self, width: int, classes: int, *, bias: bool, options: LossOptions, embedding: nn.Embedding | None = None
    ) -> None:
        super().__init__()
        self.options = options
        self.weight = nn.Parameter(torch.empty(classes, width)) if embedding is None else embedding.weight
        assert self.weight.shape == (classes, width), f"a tied head of {classes} x {width} on {tuple(self.weight.shape)}"
        self.bias = nn.Parameter(torch.empty(classes)) if bias else None

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        signal: Signal | None = None,
        denominator: float | None = None,
        mode: Literal["loss", "logits"] = "loss",
    ) -> LossResult | Tensor:
        """mode loss: hidden [N, D], labels [N] int64 -> LossResult; mode logits: hidden -> logits [N, V].

        With a signal the loss is the one `options` describe; without, the labels' cross entropy, whatever alpha says.
        denominator: what the sums are divided by; None: the N positions.
        """
        if mode == "logits":
            return F.linear(hidden, self.weight, self.bias)
        options, teacher = self.options, _teacher_arguments(signal)
        if signal is None:
            options = dataclasses.replace(options, alpha=1.0)
        elif signal.kind in ("topk", "sampled"):
            options = dataclasses.replace(options, teacher_temperature=1.0)  # their probabilities have the temperature already
        return linear_distillation_loss(
            hidden, self.weight, bias=self.bias, labels=labels, denominator=denominator, options=options, **teacher
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] -> logits [N, V] in its dtype."""
        return self(hidden, mode="logits")


def _teacher_arguments(signal: Signal | None) -> dict[str, Any]:
    if signal is None:
        return {}
    if signal.kind == "dense":
        return {"teacher_logits": signal.values}
    if signal.kind == "argmax":
        return {"teacher_ids": signal.values}
    if signal.kind == "topk":
        return {
            "teacher_ids": signal.values,
            "teacher_logprobs": signal.logprobs,
            "teacher_log_rest": signal.log_rest,
            "convention": "tail",
        }
    if signal.kind == "sampled":
        draws = signal.values.shape[1]
        weights = torch.full(signal.values.shape, -math.log(draws), dtype=torch.float32, device=signal.values.device)
        return {"teacher_ids": signal.values, "teacher_logprobs": weights, "convention": "sampled"}
    assert signal.head is not None  # Signal's own invariant
    return {"teacher_hidden": signal.values, "teacher_weight": signal.head.weight, "teacher_bias": signal.head.bias}
