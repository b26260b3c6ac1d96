"""The public losses' inputs in the one form that the rest takes: positions flattened, a sharded head as its local part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .options import LossResult, TokenOutputs
from .shard import VocabularyShard
from .targets import Positions, Teacher

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def flatten(student: Tensor, teacher: Teacher, positions: Positions) -> tuple[Tensor, tuple[int, ...], Teacher, Positions]:
    """(student [N, .], the leading dimensions of student [..., .], teacher and positions [N, ...]).

    Raises ValueError that names an argument whose leading dimensions are others.
    """
    lead = tuple(student.shape[:-1])
    if len(lead) < 2:
        return student, lead, teacher, positions

    def flat(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if tuple(tensor.shape[: len(lead)]) != lead:
            raise ValueError(f"{name}: expected the student's leading dimensions {list(lead)}, got shape {list(tensor.shape)}")
        return tensor.reshape(-1, *tensor.shape[len(lead) :])

    teacher = teacher._replace(
        logits=flat("teacher_logits", teacher.logits),
        hidden=flat("teacher_hidden", teacher.hidden),
        ids=flat("teacher_ids", teacher.ids),
        logprobs=flat("teacher_logprobs", teacher.logprobs),
        log_rest=flat("teacher_log_rest", teacher.log_rest),
    )
    positions = positions._replace(
        labels=flat("labels", positions.labels), token_weights=flat("token_weights", positions.token_weights)
    )
    return student.reshape(-1, student.shape[-1]), lead, teacher, positions


def unflatten(result: LossResult, lead: tuple[int, ...]) -> LossResult:
    """What each position says, in the leading dimensions."""
    if len(lead) < 2:
        return result
    loss = result.loss if result.loss.dim() == 0 else result.loss.reshape(lead)
    tokens = result.tokens
    if tokens is not None:
        tokens = TokenOutputs(*(each.reshape(*each.shape[:-1], *lead) for each in tokens))
    return result._replace(loss=loss, tokens=tokens)


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise RuntimeError for tensors that carry a tangent: an operation without a forward derivative would drop it silently."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise RuntimeError(
                "the losses of megapd_kernels have no forward-mode derivative (jvp); distillation_loss, in plain torch, has"
            )


def split_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Teacher, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor, Tensor | None, Teacher, VocabularyShard | None]:
    """DTensors as their local parts, and which classes of the head those are.

    Raises ValueError for a DTensor that is neither replicated nor sharded by classes, and for one beside a `shard`.
    """
    if not any(_is_dtensor(t) for t in (hidden, weight, bias, teacher.hidden, teacher.weight, teacher.bias, teacher.logits)):
        return hidden, weight, bias, teacher, shard
    if shard is not None:
        raise ValueError("shard: the head is a DTensor, which says itself which classes this rank holds; leave it out")
    if _is_dtensor(weight):
        shard = _shard_of(weight)  # type: ignore[arg-type]
    logits = teacher.logits
    if _is_dtensor(logits) and shard is not None:
        logits = _local("teacher_logits", logits, 1)
    teacher = teacher._replace(
        hidden=_local("teacher_hidden", teacher.hidden),
        weight=_local("teacher_weight", teacher.weight, 0),
        bias=_local("teacher_bias", teacher.bias, 0),
        logits=logits,
    )
    whole = _local("hidden", hidden)
    assert whole is not None
    part = _local("weight", weight, 0)
    assert part is not None
    return whole, part, _local("bias", bias, 0), teacher, shard


def _is_dtensor(tensor: Tensor | None) -> bool:
    return tensor is not None and hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def _local(name: str, tensor: Tensor | None, by: int | None = None) -> Tensor | None:
    """This rank's part of a DTensor, replicated or sharded along dimension `by`; its gradient has the same placements."""
    if tensor is None or not _is_dtensor(tensor):
        return tensor
    split: DTensor = tensor  # type: ignore[assignment]
    for placement in split.placements:
        if not (placement.is_replicate() or (by is not None and placement.is_shard(by))):
            wanted = "replicated" if by is None else f"replicated or sharded by classes, dimension {by}"
            raise ValueError(f"{name}: a DTensor must be {wanted}, got {split.placements}; redistribute it")
    local: Tensor = split.to_local(grad_placements=split.placements)
    return local


def _shard_of(weight: DTensor) -> VocabularyShard | None:
    """Which classes of a head [V, D] lie here; None: all."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, dims = weight.device_mesh, [i for i, placement in enumerate(weight.placements) if placement.is_shard(0)]
    if not dims or all(mesh.size(dim) == 1 for dim in dims):
        return None
    if len(dims) > 1:
        raise ValueError(f"weight: a DTensor must be sharded by classes along one dimension of the mesh, got {weight.placements}")
    _, offset = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
    return VocabularyShard.of(mesh.get_group(dims[0]), offset[0], weight.shape[0])
