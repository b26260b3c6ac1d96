"""LossHead: the output layer and the loss as one module.

The fused loss never forms the logits, so it needs the output weight itself. Under ZeRO-3 that weight exists on a rank
only while the module that registers it runs, between the hooks of its __call__. Hence the module that owns the weight
calls the kernel, inside the model's forward: DeepSpeed gathers the weight before, reduces its gradient after, and no
other code touches it. A tied head registers the embedding's Parameter a second time; ZeRO counts it once.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megapd.signals import LossTargets, Signal
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
        options, targets = self.options, LossTargets() if signal is None else signal.targets
        if signal is None:
            options = dataclasses.replace(options, alpha=1.0)
        elif "temperature" in signal.spec.definition.uses:  # its probabilities have the temperature already
            options = dataclasses.replace(options, teacher_temperature=1.0)
        return linear_distillation_loss(
            hidden, self.weight, bias=self.bias, labels=labels, denominator=denominator, options=options, **targets
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] -> logits [N, V] in its dtype."""
        logits: Tensor = self(hidden, mode="logits")
        return logits
