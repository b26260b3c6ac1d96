"""TRL's distillation losses, and its trainers without their logits; conventions of trl 1.16."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import linear_softmax_kl, softmax_kl
from ..options import LossOptions
from .conventions import CAPS, at_least_one, head_of, interpolated, logit_shape

# weight [V, D], bias [V] or None, cap
Head = tuple[Tensor, Tensor | None, float | None]


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
    counted = _counted(labels)
    return softmax_kl(student_logits, teacher_logits, token_weights=counted, denominator=denominator, options=options).loss


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
    The entropy is at the temperature, as its divergence. A head that is a DTensor is gathered, as TRL gathers it."""
    student = (student_logit_scale, student_final_logit_softcapping)
    teacher = (teacher_logit_scale, teacher_final_logit_softcapping)
    options = _options(beta, temperature, student, teacher, per_token=True)
    counted = completion_mask != 0
    result = linear_softmax_kl(
        student_hidden_states,
        _gathered(student_lm_head_weight, student_hidden_states.dtype),
        teacher_hidden_states,
        _gathered(teacher_lm_head_weight, teacher_hidden_states.dtype),
        bias=None if student_lm_head_bias is None else _gathered(student_lm_head_bias, student_hidden_states.dtype),
        teacher_bias=None if teacher_lm_head_bias is None else _gathered(teacher_lm_head_bias, teacher_hidden_states.dtype),
        token_weights=counted,
        denominator=at_least_one(counted.sum()) if num_items_in_batch is None else num_items_in_batch,
        options=options,
    )
    assert result.tokens is not None
    return result.loss, result.tokens.entropy.sum(), counted.sum()


def use_in(trainer: Any) -> Any:
    """A GKDTrainer, GOLDTrainer or DistillationTrainer, made before, that computes its loss by megapd_kernels; returns it.

    GKDTrainer and GOLDTrainer form logits of both models, [B, T, V]: here both give their last hidden states while the loss is
    computed, which applies the heads with their caps. Where the outputs are asked for as well, as compute_metrics does, TRL's own
    loss and the logits come. Generation is not touched. DistillationTrainer hands over hidden states already: its loss function
    alone is replaced.

    Raises ValueError for another trainer; for GOLD between tokenizers (use_uld_loss) and a subclass with a compute_loss of its
    own, which may read the logits; for a teacher on a server, which gives no hidden states; and for a head that is in parts
    (ZeRO-3, FSDP) or more than a linear layer, see `head_of`.
    """
    if hasattr(trainer, "_megapd_kernels"):
        return trainer
    # Of two bases of one name, the older: TRL leaves subclasses behind where a trainer was before.
    name, bases = type(trainer).__name__, {base.__name__: base for base in type(trainer).__mro__}
    gives_logits = next((bases[each] for each in ("GKDTrainer", "GOLDTrainer") if each in bases), None)
    if gives_logits is not None:
        if getattr(trainer, "use_uld_loss", False):
            raise ValueError(f"trainer: {name} with use_uld_loss compares logits of two tokenizers; leave its loss as it is")
        if getattr(trainer.compute_loss, "__func__", None) is not vars(gives_logits)["compute_loss"]:
            raise ValueError(f"trainer: {name} has a compute_loss of its own, which may read the logits; leave its loss as it is")
        for model in (trainer.model, trainer.teacher_model):
            _hookable(_unwrapped(trainer, model))
        _replace_logits(trainer)
    elif "DistillationTrainer" in bases:
        if getattr(trainer, "teacher_model", None) is None:
            raise ValueError(f"trainer: {name} has a teacher on a server, which gives no hidden states; leave its loss as it is")
        _replace_chunked(trainer, bases["DistillationTrainer"])
    else:
        raise ValueError(f"trainer: {name} is no GKDTrainer, GOLDTrainer or DistillationTrainer")
    trainer._megapd_kernels = True
    return trainer


def _replace_logits(trainer: Any) -> None:
    compute = trainer.compute_loss

    @functools.wraps(compute)
    def compute_loss(model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if return_outputs:
            return compute(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        models = [_unwrapped(trainer, each) for each in (model, trainer.teacher_model)]
        # Before either is changed: the two may share one configuration.
        caps = [_hookable(each) for each in models]
        with hidden_states_for_logits(models[0]), hidden_states_for_logits(models[1]):
            student, teacher = [(*head_of(each), cap) for each, cap in zip(models, caps, strict=True)]
            trainer.generalized_jsd_loss = functools.partial(_linear_jsd, student, teacher)
            try:
                return compute(model, inputs, num_items_in_batch=num_items_in_batch)
            finally:
                del trainer.generalized_jsd_loss

    trainer.compute_loss = compute_loss


def _replace_chunked(trainer: Any, base: type) -> None:
    module, name, compute = sys.modules[base.__module__], "_chunked_divergence_loss", trainer._compute_loss

    @functools.wraps(compute)
    def _compute_loss(*arguments: Any, **named: Any) -> Any:
        theirs = getattr(module, name)
        setattr(module, name, chunked_divergence_loss)
        try:
            return compute(*arguments, **named)
        finally:
            setattr(module, name, theirs)

    trainer._compute_loss = _compute_loss


def _hookable(model: nn.Module) -> float | None:
    """The cap of the model's logits. Raises ValueError where `hidden_states_for_logits` cannot serve it."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    scale, cap = logit_shape(config)
    _, bias = head_of(model)
    if cap is not None and getattr(config, CAPS[0], None) is None:
        raise ValueError(
            f"model: {type(model).__name__} caps its logits and cannot do without; leave the trainer's loss as it is"
        )
    if bias is not None and scale != 1.0:
        raise ValueError(f"model: {type(model).__name__} scales its logits and their bias; leave the trainer's loss as it is")
    return cap


@contextmanager
def hidden_states_for_logits(model: nn.Module) -> Iterator[None]:
    """While open, the model's `logits` are its last hidden states, times the factor that it gives its logits: with its head's
    weight and the cap, which it does not apply, they make them. Raises ValueError as `use_in`.

    The model is still called through what wraps it, so that DDP and ZeRO 0-2 see its forward.
    """
    _hookable(model)
    head, config = model.get_output_embeddings(), model.config.get_text_config()  # type: ignore[union-attr, operator]
    inside, cap = head.__dict__.get("forward"), getattr(config, CAPS[0], None)
    head.forward = lambda hidden: hidden
    if cap is not None:
        setattr(config, CAPS[0], None)
    try:
        yield
    finally:
        if cap is not None:
            setattr(config, CAPS[0], cap)
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
    (weight, bias, cap), (teacher_weight, teacher_bias, teacher_cap) = student, teacher
    return linear_softmax_kl(
        student_logits,
        weight,
        teacher_logits,
        teacher_weight,
        bias=bias,
        teacher_bias=teacher_bias,
        token_weights=_counted(labels),
        denominator=_denominator(student_logits, labels, reduction, num_items_in_batch, weight.shape[0]),
        options=_options(beta, temperature, (1.0, cap), (1.0, teacher_cap)),
    ).loss


def _counted(labels: Tensor | None) -> Tensor | None:
    """Labels mask and do nothing else: they need not be classes."""
    return None if labels is None else labels != -100


def _gathered(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A DTensor as the whole tensor in a type, differentiable: FSDP's ranks hold parts of one head and rows of their own, which
    is no vocabulary split over ranks that see the same rows."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    whole: Tensor = tensor.full_tensor()
    return whole.to(dtype)


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
