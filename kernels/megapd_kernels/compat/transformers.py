"""The loss of a transformers model: as its loss_function, of logits, or of its hidden states without them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ..losses import linear_cross_entropy, softmax_kl
from ..options import LossOptions
from .conventions import head_of, logit_shape, refuse


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **rest: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss of logits [B, T, V]: `model.loss_function = causal_lm_loss`. No float32 copy of the logits.

    The label of position i is labels[:, i + 1], or shift_labels[:, i]; the mean is over the counted labels, or the sum over
    num_items_in_batch. label_smoothing is accepted; what else transformers may pass and would change the loss is refused.
    """
    smoothing = float(rest.pop("label_smoothing", 0.0) or 0.0)
    refuse(weight=rest.pop("weight", None) is not None, reduction=rest.pop("reduction", None))
    if logits.shape[-1] != vocab_size:
        raise ValueError(f"vocab_size: the logits have {logits.shape[-1]} classes, got {vocab_size}")
    return softmax_kl(
        logits.reshape(-1, vocab_size),
        labels=_shifted(labels, shift_labels, ignore_index).reshape(-1).to(logits.device),
        ignore_index=ignore_index,
        denominator=num_items_in_batch,
        options=LossOptions(label_smoothing=smoothing),
    ).loss


def causal_lm_loss_from_hidden(
    model: nn.Module,
    hidden: Tensor,
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    options: LossOptions | None = None,
) -> Tensor:
    """The same from the last hidden states [B, T, D] of the model's backbone, without its logits: Gemma's cap, Cohere's and
    Granite's scale are the model's own. options: of the loss' other terms; its scale and cap are not looked at."""
    scale, cap = logit_shape(model.config.get_text_config())  # type: ignore[union-attr, operator]
    weight, bias = head_of(model)
    return linear_cross_entropy(
        hidden,
        weight,
        _shifted(labels, shift_labels, ignore_index).to(hidden.device),
        bias=bias,
        ignore_index=ignore_index,
        denominator=num_items_in_batch,
        options=replace(options or LossOptions(), logit_scale=scale, soft_cap=cap),
    ).loss


def _shifted(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    if shift_labels is not None:
        return shift_labels
    if labels is None:
        raise ValueError("labels: give them, or shift_labels")
    return functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def patch(model: nn.Module) -> nn.Module:
    """The model, computing its loss by `causal_lm_loss`."""
    model.loss_function = causal_lm_loss  # type: ignore[assignment]
    return model
