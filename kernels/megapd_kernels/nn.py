"""The losses as modules: the settings are LossOptions' fields by name, the call takes tensors.

A head that the loss owns is read in the head's own forward, where ZeRO-3 and FSDP have gathered it, whether they wrap the model,
the loss or the head alone; one that it does not own is given at each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .losses import linear_cross_entropy, linear_distillation_loss, softmax_kl
from .options import LossOptions, LossResult


class _Loss(nn.Module):
    def __init__(self, options: LossOptions | None, settings: dict[str, Any]) -> None:
        super().__init__()
        if options is not None and settings:
            raise ValueError(f"options: give LossOptions, or its fields by name ({', '.join(settings)}), not both")
        self.options = LossOptions(**settings) if options is None else options

    def extra_repr(self) -> str:
        default = LossOptions()
        changed = {name: value for name, value in vars(self.options).items() if not name.startswith("_")}
        return ", ".join(f"{name}={value!r}" for name, value in changed.items() if value != getattr(default, name))


class Head(nn.Linear):
    """A linear head that also hands its parameters to a loss, from inside its forward: read from outside, a head that
    fully_shard wraps by itself is a DTensor of a part of the classes, which says nothing of whose rows those are."""

    def forward(self, hidden: Tensor, loss: Callable[[Tensor, Tensor, Tensor | None], LossResult] | None = None) -> Any:
        """The logits [..., V] of hidden [..., D], or loss(hidden, weight, bias)."""
        return super().forward(hidden) if loss is None else loss(hidden, self.weight, self.bias)


class _LinearLoss(_Loss):
    """Owns a head [classes, width] where both are given, else takes weight and bias with each call."""

    def __init__(
        self,
        width: int | None = None,
        classes: int | None = None,
        *,
        bias: bool = False,
        options: LossOptions | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(options, settings)
        if (width is None) != (classes is None):
            raise ValueError("width, classes: a head needs both; leave both out to give the weight with each call")
        self.head = None if width is None or classes is None else Head(width, classes, bias=bias)

    def _of_head(
        self,
        loss: Callable[[Tensor, Tensor, Tensor | None], LossResult],
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> LossResult:
        if self.head is not None:
            if weight is not None or bias is not None:
                raise ValueError("weight, bias: this loss owns its head; leave them out")
            result: LossResult = self.head(hidden, loss)
            return result
        if weight is None:
            raise ValueError("weight: needed where the loss owns no head")
        return loss(hidden, weight, bias)


class LinearDistillation(_LinearLoss):
    """linear_distillation_loss. LinearDistillation(width, classes, divergence="reverse_kl", alpha=0.1) owns a head; without width
    and classes the call takes weight [V, D] and bias [V]. Raises ValueError that names the argument."""

    def forward(self, hidden: Tensor, *, weight: Tensor | None = None, bias: Tensor | None = None, **given: Any) -> LossResult:
        """hidden [..., D]; given: the teacher, labels and weights, as linear_distillation_loss takes them."""

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LossResult:
            return linear_distillation_loss(hidden, weight, bias=bias, options=self.options, **given)

        return self._of_head(loss, hidden, weight, bias)


class LinearCrossEntropy(_LinearLoss):
    """linear_cross_entropy, with or without a head of its own as LinearDistillation."""

    def forward(
        self, hidden: Tensor, labels: Tensor, *, weight: Tensor | None = None, bias: Tensor | None = None, **given: Any
    ) -> LossResult:
        """hidden [..., D], labels [...]; given: as linear_cross_entropy takes it."""

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LossResult:
            return linear_cross_entropy(hidden, weight, labels, bias=bias, options=self.options, **given)

        return self._of_head(loss, hidden, weight, bias)


class SoftmaxDivergence(_Loss):
    """softmax_kl of logits that exist: SoftmaxDivergence(divergence="jsd", beta=0.3)."""

    def __init__(self, *, options: LossOptions | None = None, **settings: Any) -> None:
        super().__init__(options, settings)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor | None = None, **given: Any) -> LossResult:
        """Logits [..., V] of both; given: as softmax_kl takes it."""
        return softmax_kl(student_logits, teacher_logits, options=self.options, **given)
