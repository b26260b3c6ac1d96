"""What the shims share."""

from __future__ import annotations

from typing import Any

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
    """Raise ValueError for a setting of the other library that has no counterpart here, unless its value is None or False."""
    for name, value in values.items():
        if value:
            raise ValueError(f"{name}: {value!r} has no counterpart in megapd_kernels; leave it at its default")


# What configurations of transformers' models call the cap of their logits. The first alone may be None, which caps nothing.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")


def logit_shape(config: Any) -> tuple[float, float | None]:
    """(scale, cap) that a transformers configuration applies to its logits: a factor, Cohere's logit_scale, Falcon-H1's
    lm_head_multiplier or output_multiplier; Granite's logits_scaling, by which it divides and HyperCLOVA X multiplies; a cap, of
    Gemma, RecurrentGemma or xLSTM. Raises ValueError for a cap under a name that is not known here."""
    scale = next((value for name in _FACTORS if (value := getattr(config, name, None)) is not None), None)
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        by = config.logits_scaling
        scale = by if getattr(config, "model_type", "") == "hyperclovax" else 1.0 / by
    for name, value in vars(config).items():
        caps = "cap" in name and "logit" in name and "attn" not in name and "attention" not in name
        if caps and name not in CAPS and value is not None:
            raise ValueError(f"model: its configuration caps logits by {name}, which megapd_kernels does not know")
    cap = next((value for name in CAPS if (value := getattr(config, name, None)) is not None), None)
    return 1.0 if scale is None else float(scale), cap


def head_of(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight [V, D], bias [V] or None) of a transformers model.

    Raises ValueError where it has no output embedding, or one that is more than a linear layer (LoRA's, a quantised one), or
    whose weight is in parts: partitioned by ZeRO-3, or a DTensor of FSDP, whose ranks have rows of their own.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise ValueError(f"model: {type(model).__name__} has no output embedding; give a model with a language-modelling head")
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise ValueError(f"model: its head is a {type(head).__name__}, not a torch.nn.Linear of floating point; use its logits")
    if head.weight.numel() == 0 or hasattr(head.weight, "placements"):
        how = "a DTensor (FSDP)" if hasattr(head.weight, "placements") else "partitioned (ZeRO-3)"
        raise ValueError(f"model: the head's weight is {how}; gather it, or put the loss inside the model, see megapd_kernels.nn")
    return head.weight, head.bias
