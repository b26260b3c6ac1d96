"""Where a DeepSpeed engine keeps a student's fp32 weights and what its optimizer knows of them: pieces of flat tensors, by name.

Each of its optimizers lays parameters out in its own way, whole or in parts over the ranks. A piece says which elements of which
parameter lie where on this rank; what is in it is the same whatever the stage, the precision or the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megapd.errors import UserError


@dataclass(frozen=True)
class Piece:
    """Elements start ... start + count of a parameter, flattened, on this rank.

    shape   of the whole parameter
    flat    what the torch optimizer updates, fp32; the piece begins at its element `at`, flattened
    """

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    flat: Tensor
    at: int

    def of(self, tensor: Tensor) -> Tensor:
        """The piece's view of `tensor`, which is laid out as `flat` is. [count]"""
        return tensor.detach().view(-1).narrow(0, self.at, self.count)


def pieces(engine: Any, learner: nn.Module, rank: int) -> list[Piece]:
    """What this rank updates of `learner` under the DeepSpeed engine; every element lies on one rank or, at stage 0, on all."""
    names = {id(parameter): name for name, parameter in learner.named_parameters()}
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(_stage3(optimizer, names, rank))
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return list(_partitioned(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, names))
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return list(_partitioned(optimizer.fp32_groups_flat_partition, optimizer.bf16_groups, names))
    # Stage 0: whole parameters, in 16 bits beside fp32 copies of theirs.
    flats = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parameters = [p for group in optimizer.fp16_groups for p in group] if hasattr(optimizer, "fp16_groups") else flats
    named = zip(flats, (names[id(parameter)] for parameter in parameters), strict=True)
    return [Piece(name, tuple(flat.shape), 0, flat.numel(), flat, 0) for flat, name in named]


def _partitioned(flats: list[Tensor], groups: list[list[Tensor]], names: dict[int, str]) -> Iterator[Piece]:
    """Stages 1 and 2: each rank has a part of each group's parameters, one after the other."""
    for flat, group in zip(flats, groups, strict=True):
        for parameter in group:
            if (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Piece(names[id(parameter)], tuple(parameter.shape), here.start, here.numel, flat, there.start)


def _stage3(optimizer: Any, names: dict[int, str], rank: int) -> Iterator[Piece]:
    """Each rank has a part of each parameter, padded to be equal on all ranks."""
    if optimizer.swap_optimizer:
        raise UserError("training.deepspeed: offload_optimizer to nvme has no checkpoints here; choose the device cpu or none")
    for group in optimizer.fp16_groups:
        for parameter in group:
            index, at, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = rank * padded
            count = min(padded, parameter.ds_numel - start)
            if count > 0:
                flat = optimizer.fp32_partitioned_groups_flat[index]
                yield Piece(names[id(parameter)], tuple(parameter.ds_shape), start, count, flat, at)


# ----------------------------------------------------------------------------------------------------- beside the weights


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """What updates the flat tensors, beneath DeepSpeed's wrapper."""
    found: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return found


def moments(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps an element of `flat`: exp_avg and exp_avg_sq, or momentum_buffer, or nothing yet."""
    kept = optimizer.state.get(flat, {}).items()
    return {key: value for key, value in kept if isinstance(value, Tensor) and value.shape == flat.shape and value.ndim > 0}


def updates(optimizer: torch.optim.Optimizer, flat: Tensor) -> float | None:
    """How often the optimizer has updated `flat`, None where it does not count."""
    step = optimizer.state.get(flat, {}).get("step")
    return None if step is None else float(step)


def set_moments(optimizer: torch.optim.Optimizer, flat: Tensor, keys: list[str], step: float | None) -> dict[str, Tensor]:
    """Zeros a key, in the optimizer's state of `flat`, to be filled; what was there before is gone."""
    state: dict[str, Any] = {key: torch.zeros_like(flat, requires_grad=False) for key in keys}
    if step is not None:
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        state = {"step": torch.tensor(step, dtype=torch.float32, device=flat.device if on_device else "cpu"), **state}
    optimizer.state[flat] = state
    return {key: state[key] for key in keys}


def refresh_stage3(optimizer: Any) -> None:
    """Make the partitions that the forward pass gathers those of the fp32 weights. A collective."""
    optimizer.checkpoint_event_prologue()
    for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        if flat.numel() == 0:
            continue
        low = optimizer.fp16_partitioned_groups_flat[index]
        low.data.copy_(flat.data)
        parts = optimizer.fp16_partitioned_groups[index]
        for part, new in zip(parts, optimizer.unflatten(low, parts), strict=True):
            part.data = new.data
    optimizer.checkpoint_event_epilogue()


def scaler(engine: Any) -> dict[str, float]:
    """The state of the fp16 loss scale, {} where there is none."""
    return {key: value for key, value in vars(_scaler(engine)).items() if type(value) in (int, float)} if _scales(engine) else {}


def set_scaler(engine: Any, state: dict[str, float]) -> None:
    """Nothing where only one of the engines, this and that of `state`, has one."""
    if _scales(engine):
        vars(_scaler(engine)).update(state)


def _scales(engine: Any) -> bool:
    return bool(engine.fp16_enabled())


def _scaler(engine: Any) -> Any:
    return getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config
