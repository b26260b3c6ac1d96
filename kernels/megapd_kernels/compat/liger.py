"""The losses of liger-kernel by its names: the arguments, defaults and normalisation are its, conventions of liger-kernel 0.8."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..losses import linear_cross_entropy, linear_softmax_kl
from ..options import LossOptions
from .conventions import at_least_one, interpolated, refuse


class LigerFusedLinearJSD(nn.Module):
    """liger_kernel.transformers.LigerFusedLinearJSD: no labels' term; both sides at one temperature, no T^2; the mean over the
    positions whose label counts. accum_dtype: megapd_kernels accumulates in float32; another type is refused."""

    def __init__(
        self, jsd_beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0, accum_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        refuse(accum_dtype=None if accum_dtype in (None, torch.float32) else accum_dtype)
        self.ignore_index = ignore_index
        self.options = LossOptions(interpolated(jsd_beta), teacher_temperature=temperature, student_temperature=temperature)

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        return linear_softmax_kl(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            token_weights=None if shift_labels is None else shift_labels != self.ignore_index,
            options=self.options,
        ).loss


class LigerFusedLinearJSDLoss(nn.Module):
    """liger_kernel.chunked_loss.LigerFusedLinearJSDLoss: weight_hard_loss CE + weight_soft_loss D, each the mean over the
    positions whose label counts; the temperature is of D alone. compiled and chunk_size change no value and are accepted."""

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.total = weight_hard_loss + weight_soft_loss
        if not self.total > 0 or min(weight_hard_loss, weight_soft_loss) < 0:
            given = f"{weight_hard_loss}, {weight_soft_loss}"
            raise ValueError(f"weight_hard_loss, weight_soft_loss: must not be negative, nor both 0, got {given}")
        self.ignore_index, self.return_soft_hard_loss = ignore_index, return_soft_hard_loss
        self.options = LossOptions(
            interpolated(beta),
            teacher_temperature=temperature,
            student_temperature=temperature,
            alpha=weight_hard_loss / self.total,
        )

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        keep = true_labels != self.ignore_index
        count = at_least_one(keep.sum())
        named = self.options.alpha > 0 or self.return_soft_hard_loss  # else labels mask, and may lie outside the classes
        result = linear_softmax_kl(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            bias=student_bias,
            teacher_bias=teacher_bias,
            labels=true_labels if named else None,
            token_weights=keep,
            ignore_index=self.ignore_index,
            denominator=count,
            options=self.options,
        )
        loss = result.loss * self.total
        if self.return_soft_hard_loss:
            return loss, result.divergence / count, result.cross_entropy / count
        return loss


class CrossEntropyOutput(NamedTuple):
    """Of LigerFusedLinearCrossEntropyLoss, where more than the loss is asked for; what is not is None."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """liger_kernel.transformers.LigerFusedLinearCrossEntropyLoss: lse_square_scale is z_loss, softcap soft_cap, ce_weight
    class_weights with the mean over the labels' weights. use_token_scaling: each position's loss times its label's probability,
    a constant. Refused: an accum_dtype but float32, and ce_weight with label_smoothing or, in a mean, with lse_square_scale."""

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        refuse(accum_dtype=None if accum_dtype in (None, torch.float32) else accum_dtype)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: {reduction!r} is not one of mean, sum, none")
        if ce_weight is not None and label_smoothing > 0:
            raise ValueError("ce_weight: cannot be combined with label_smoothing here; set one of them")
        if ce_weight is not None and lse_square_scale > 0 and reduction == "mean":
            raise ValueError(
                "ce_weight: in a mean liger divides lse_square_scale's term by another sum than the rest; choose reduction sum"
            )
        self.use_token_scaling = use_token_scaling
        self.ce_weight, self.ignore_index, self.reduction = ce_weight, ignore_index, reduction
        self.return_z_loss, self.return_token_accuracy, self.return_predicted_tokens = (
            return_z_loss,
            return_token_accuracy,
            return_predicted_tokens,
        )
        self.options = LossOptions(
            soft_cap=softcap,
            z_loss=lse_square_scale,
            label_smoothing=label_smoothing,
            reduction="none" if reduction == "none" or use_token_scaling else "mean",
            per_token=return_z_loss or return_token_accuracy or return_predicted_tokens or use_token_scaling,
        )

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        keep = target != self.ignore_index
        count = at_least_one(keep.sum())
        result = linear_cross_entropy(
            _input,
            lin_weight,
            target,
            bias=bias,
            class_weights=self.ce_weight,
            ignore_index=self.ignore_index,
            denominator=1.0 if self.reduction == "sum" else None,
            options=self.options,
        )
        loss, tokens = result.loss, result.tokens
        if tokens is None:
            return loss
        scaling: Tensor | float = 1.0
        if self.use_token_scaling:
            scaling = tokens.label_logprob.exp()
            loss = loss * scaling
            if self.reduction != "none":
                weights = keep if self.ce_weight is None else self.ce_weight[target.masked_fill(~keep, 0)] * keep
                loss = loss.sum() / (weights.sum().clamp(min=1e-30) if self.reduction == "mean" else 1.0)
        z_loss = accuracy = None
        if self.return_z_loss:
            z_loss = self.options.z_loss * tokens.logsumexp.square() * scaling * keep
            if self.reduction != "none":
                z_loss = z_loss.sum() / (count if self.reduction == "mean" else 1.0)
        if self.return_token_accuracy:
            right = ((tokens.argmax == target) & keep).float()
            accuracy = right if self.reduction == "none" else right.sum() / count
        predicted = tokens.argmax if self.return_predicted_tokens else None
        if self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens:
            return CrossEntropyOutput(loss, z_loss, accuracy, predicted)
        return loss
