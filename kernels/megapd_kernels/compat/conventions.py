"""What the shims share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..divergences import JSD, Divergence, ForwardKL, ReverseKL


def interpolated(beta: float) -> Divergence:
    """GKD's generalised JSD (arXiv 2306.13649) as libraries have it: JSD(beta) inside (0, 1), the forward KL at 0, the reverse KL
    at 1, where the JSD itself would vanish. Raises ValueError outside [0, 1]."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta: must lie in [0, 1], got {beta}")
    if beta == 0.0:
        return ForwardKL()
    return ReverseKL() if beta == 1.0 else JSD(beta)


def at_least_one(count: Tensor) -> Tensor:
    """A count of positions as a denominator that gives 0, not NaN, for none."""
    return count.clamp(min=1).to(torch.float32)


def refuse(**values: object) -> None:
    """Raise ValueError for a setting of the other library that has no counterpart here; each is given as (value, allowed)."""
    for name, value in values.items():
        if value:
            raise ValueError(f"{name}: {value!r} has no counterpart in megapd_kernels; leave it at its default")


def logit_shape(config: object) -> tuple[float, float | None]:
    """(scale, cap) that a transformers configuration applies to its logits: Cohere's logit_scale, Granite's logits_scaling, by
    which it divides, and Gemma's final_logit_softcapping."""
    scale = getattr(config, "logit_scale", None)
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        by = config.logits_scaling  # type: ignore[attr-defined]
        scale = by if getattr(config, "model_type", "") == "hyperclovax" else 1.0 / by
    return 1.0 if scale is None else float(scale), getattr(config, "final_logit_softcapping", None)


def head_of(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight [V, D], bias [V] or None) of a transformers model. Raises ValueError where it has no output embedding or its weight
    is partitioned by ZeRO-3 and not gathered."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise ValueError(f"model: {type(model).__name__} has no output embedding; give a model with a language-modelling head")
    weight: Tensor = head.weight
    if weight.numel() == 0:
        raise ValueError(
            "model: the head's weight is partitioned (ZeRO-3); gather it, or put the loss inside the model, see nn.py"
        )
    return weight, getattr(head, "bias", None)
