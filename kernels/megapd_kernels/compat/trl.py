"""TRL's distillation losses, and its trainers without their logits; conventions of trl 1.16."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..losses import linear_softmax_kl, softmax_kl
from ..options import LossOptions
from .conventions import at_least_one, head_of, interpolated, logit_shape


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """GKDTrainer.generalized_jsd_loss of logits [B, T, V] (or [N, V]) and labels [B, T], -100 for what does not count.

    batchmean: the sum over the labels that count, or without labels over the first dimension; sum; num_items_in_batch: the sum
    over it. mean, over classes too, as TRL's. none, a value a class, is refused: megapd_kernels does not form it.
    """
    options = _options(beta, temperature)
    denominator = _denominator(student_logits, labels, reduction, num_items_in_batch)
    return softmax_kl(student_logits, teacher_logits, labels=labels, denominator=denominator, options=options).loss


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """DistillationTrainer's loss of hidden states [B, T, D], [B, T, E]: (loss, sum of the student's entropies, counted).
    The entropy is at the temperature, as its divergence."""
    student = (student_logit_scale, student_final_logit_softcapping)
    teacher = (teacher_logit_scale, teacher_final_logit_softcapping)
    options = _options(beta, temperature, student, teacher, per_token=True)
    counted = completion_mask != 0
    result = linear_softmax_kl(
        student_hidden_states,
        student_lm_head_weight,
        teacher_hidden_states,
        teacher_lm_head_weight,
        bias=student_lm_head_bias,
        teacher_bias=teacher_lm_head_bias,
        token_weights=counted,
        denominator=at_least_one(counted.sum()) if num_items_in_batch is None else num_items_in_batch,
        options=options,
    )
    assert result.tokens is not None
    return result.loss, result.tokens.entropy.sum(), counted.sum()


def use_in(trainer: Any) -> Any:
    """A GKDTrainer or a DistillationTrainer, made before, that computes its loss by megapd_kernels; returns it.

    GKDTrainer forms logits of both models, [B, T, V]: here both give their last hidden states while it computes its loss, which
    applies the heads (with Gemma's cap and Cohere's scale). Generation is not touched. DistillationTrainer hands over hidden
    states already: its loss function alone is replaced. Under ZeRO-3, which partitions the heads, the loss is refused.
    Raises ValueError for another trainer.
    """
    if hasattr(trainer, "generalized_jsd_loss"):
        compute = trainer.compute_loss

        @functools.wraps(compute)
        def compute_loss(model: nn.Module, *arguments: Any, **named: Any) -> Any:
            student, teacher = (_unwrapped(trainer, each) for each in (model, trainer.teacher_model))
            with hidden_states_for_logits(student) as ours, hidden_states_for_logits(teacher) as theirs:
                trainer.generalized_jsd_loss = functools.partial(_linear_jsd, ours, theirs)
                return compute(model, *arguments, **named)

        trainer.compute_loss = compute_loss
        return trainer
    module, name = sys.modules[type(trainer).__module__], "_chunked_divergence_loss"
    if not hasattr(module, name):
        raise ValueError(f"trainer: {type(trainer).__name__} is neither a GKDTrainer nor a DistillationTrainer")
    compute = trainer._compute_loss

    @functools.wraps(compute)
    def _compute_loss(*arguments: Any, **named: Any) -> Any:
        theirs = getattr(module, name)
        setattr(module, name, chunked_divergence_loss)
        try:
            return compute(*arguments, **named)
        finally:
            setattr(module, name, theirs)

    trainer._compute_loss = _compute_loss
    return trainer


Head = Callable[[], tuple[Tensor, Tensor | None, float, float | None]]


@contextmanager
def hidden_states_for_logits(model: nn.Module) -> Iterator[Head]:
    """While open, the model's `logits` are its last hidden states; gives what its head is: weight, bias, logit scale, soft cap.

    The model is still called through what wraps it, so that DDP and ZeRO 0-2 see its forward.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()  # type: ignore[union-attr, operator]
    head_of(model)
    scale, cap = logit_shape(config)
    inside = head.__dict__.get("forward")
    head.forward = lambda hidden: hidden / scale  # the model multiplies by it
    if cap is not None:
        config.final_logit_softcapping = None
    try:
        yield lambda: (*head_of(model), scale, cap)
    finally:
        if cap is not None:
            config.final_logit_softcapping = cap
        if inside is None:
            del head.forward
        else:
            head.forward = inside


def _linear_jsd(
    student: Head,
    teacher: Head,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """generalized_jsd_loss of hidden states in the logits' places."""
    weight, bias, scale, cap = student()
    teacher_weight, teacher_bias, teacher_scale, teacher_cap = teacher()
    options = _options(beta, temperature, (scale, cap), (teacher_scale, teacher_cap))
    return linear_softmax_kl(
        student_logits,
        weight,
        teacher_logits,
        teacher_weight,
        bias=bias,
        teacher_bias=teacher_bias,
        labels=labels,
        denominator=_denominator(student_logits, labels, reduction, num_items_in_batch, weight.shape[0]),
        options=options,
    ).loss


def _options(
    beta: float,
    temperature: float,
    student: tuple[float, float | None] = (1.0, None),
    teacher: tuple[float, float | None] = (1.0, None),
    *,
    per_token: bool = False,
) -> LossOptions:
    """student, teacher: each side's logit scale and cap; the temperature is of both."""
    return LossOptions(
        interpolated(beta),
        teacher_temperature=temperature,
        student_temperature=temperature,
        logit_scale=student[0],
        soft_cap=student[1],
        teacher_logit_scale=teacher[0],
        teacher_soft_cap=teacher[1],
        per_token=per_token,
    )


def _denominator(
    student: Tensor, labels: Tensor | None, reduction: str, items: Tensor | int | None, classes: int | None = None
) -> Tensor | float:
    """TRL's of each reduction; classes: where `student` holds hidden states."""
    if items is not None:
        return items
    if reduction == "sum":
        return 1.0
    if reduction not in ("batchmean", "mean"):
        raise ValueError(f"reduction: {reduction!r} is a value a class, which megapd_kernels does not form; choose batchmean")
    positions = student.shape[:-1].numel()
    if reduction == "mean":
        counted: Tensor | int = positions if labels is None else (labels != -100).sum()
        return counted * (classes or student.shape[-1])
    return max(len(student), 1) if labels is None else at_least_one((labels != -100).sum())


def _unwrapped(trainer: Any, model: nn.Module) -> nn.Module:
    unwrapped: nn.Module = trainer.accelerator.unwrap_model(model)
    return unwrapped
