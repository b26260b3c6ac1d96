"""Holders: one teacher's weights in the memory of one or several ranks, replaced in place.

whole    every rank holds all of it and answers for itself
zero     DeepSpeed ZeRO-3 without optimizer: a rank holds a flat part of every parameter, which are gathered layer by layer
         while they are used. All ranks must run at once, each on a batch of its own
tensor   matrices are split over the ranks (models/sharding.py), the head by classes. All ranks must run the same batch at once
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megapd.batch import Batch
from megapd.errors import UserError
from megapd.models.sharding import allocate, plan_for, shard, vocabulary_shard
from megapd.signals import Head
from megapd.slices import Flat, Part
from megapd.world import World, init_deepspeed
from megapd_kernels import VocabularyShard


class Holder:
    """One teacher's weights as far as this rank has them.

    parts: for every tensor of a checkpoint what this rank needs of it. classes: of the whole head.
    """

    model: nn.Module
    parts: dict[str, Part]
    _shard: VocabularyShard | None = None
    _in_place = False

    def __init__(self, model: Any) -> None:
        self.classes = int(model.head.weight.shape[0])

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace this rank's weights by what `stage` made of tensors, one a name of `parts`, each that part.

        All or nothing: shapes are compared before the first is replaced. Where a staged tensor lies on the weights' device it
        becomes the weight: a rotation then costs no copy at all.
        """
        targets = self._targets(tensors)
        assert targets.keys() == tensors.keys()
        for name, target in targets.items():
            if target.shape != tensors[name].shape:
                raise UserError(f"{name} has shape {tuple(tensors[name].shape)} in the checkpoint, not {tuple(target.shape)}")
        for name, target in targets.items():
            staged = tensors[name]
            if staged.device == target.device and staged.dtype == target.dtype and not self._in_place:
                target.data = staged
            else:
                target.data.copy_(staged, non_blocking=True)

    def _targets(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What tensors replace, by name."""
        return dict(self.model.named_parameters())

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states [N, D] of the labelled positions."""
        hidden: Tensor = self.model(batch, mode="hidden")
        return hidden

    def trial(self, tensors: Mapping[str, Tensor], batch: Batch) -> Tensor | None:
        """What `hidden` will give when the staged `tensors` are loaded, from another thread than those that answer; None where
        that takes other ranks, or memory that is not there."""
        return None

    @contextmanager
    def head(self) -> Iterator[tuple[Head, VocabularyShard | None]]:
        """The head as far as this rank has it, and which of its classes that is; None: all."""
        head: Any = self.model.head
        yield Head(head.weight, head.bias).map(Tensor.detach), self._shard


class WholeHolder(Holder):
    """Every rank holds the whole model."""

    def __init__(self, model: nn.Module, world: World, dtype: torch.dtype) -> None:
        super().__init__(model)
        self.model = allocate(model.to(dtype), world.device).requires_grad_(False).eval()
        self.parts = dict.fromkeys((name for name, _ in model.named_parameters()), None)
        # The same modules without weights.
        bare = {id(p): nn.Parameter(p.new_empty(0), requires_grad=False) for p in self.model.parameters()}
        self._bare = copy.deepcopy(self.model, bare)

    @torch.no_grad()
    def trial(self, tensors: Mapping[str, Tensor], batch: Batch) -> Tensor | None:
        parameters = dict(self._bare.named_parameters())
        if any(tensors[name].device != parameter.device for name, parameter in parameters.items()):
            return None
        device = batch.ids.device
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        try:
            for name, parameter in parameters.items():
                parameter.data = tensors[name]
            with torch.cuda.stream(stream):  # None: nothing
                hidden: Tensor = self._bare(batch, mode="hidden")
            if stream is not None:
                stream.synchronize()
            return hidden
        finally:
            for parameter in parameters.values():
                parameter.data = parameter.new_empty(0)


class ZeroHolder(Holder):
    """DeepSpeed ZeRO-3 without an optimizer. The model is whole on the host of each rank once, when it is built."""

    _in_place = True  # what it replaces are views of DeepSpeed's own buffers

    def __init__(self, model: nn.Module, world: World, dtype: torch.dtype) -> None:
        import deepspeed

        super().__init__(model)
        init_deepspeed(world)
        model.requires_grad_(False).eval()
        sizes = {torch.bfloat16: {"bf16": {"enabled": True}}, torch.float16: {"fp16": {"enabled": True}}}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            # Threshold 0: small parameters are split too, so that `parts` holds for all of them.
            # DeepSpeed's linear layer saves memory in a backward, which a teacher has not, and would replace
            # torch.nn.functional.linear for the whole process: the student's too, and torch.compile warns of it.
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "memory_efficient_linear": False},
            **sizes.get(dtype, {}),
        }
        whole = allocate(model.to(dtype), torch.device("cpu"))
        engine, *_ = deepspeed.initialize(model=whole, config=config, dist_init_required=False)
        self._engine, self._gather = engine, deepspeed.zero.GatheredParameters
        self.model = engine.module
        self.parts = {}
        self._partitions: dict[str, Any] = dict(self.model.named_parameters())  # with what DeepSpeed put on them
        for name, parameter in self._partitions.items():
            size = parameter.ds_tensor.ds_numel
            self.parts[name] = Flat(world.rank * size, (world.rank + 1) * size)

    def _targets(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        targets = {}
        for name, parameter in self._partitions.items():
            if parameter.ds_status.name == "AVAILABLE":
                parameter.partition()  # left gathered by the last forward: its old values would be used again
            targets[name] = parameter.ds_tensor.data[: tensors[name].numel()]
        return targets

    @contextmanager
    def head(self) -> Iterator[tuple[Head, VocabularyShard | None]]:
        head: Any = self.model.head
        parameters = [head.weight] if head.bias is None else [head.weight, head.bias]
        with self._gather(parameters), super().head() as found:
            yield found


class TensorHolder(Holder):
    """Matrices split over the ranks, the head by classes; of a model built on the meta device a rank allocates its part."""

    def __init__(self, model: nn.Module, world: World, dtype: torch.dtype) -> None:
        super().__init__(model)
        group = dist.group.WORLD
        assert group is not None
        self.parts = shard(model, plan_for(model), world.rank, world.size, group)
        self.model = allocate(model.to(dtype), world.device).requires_grad_(False).eval()
        self._shard = vocabulary_shard(self.classes, world.rank, world.size, group)


HOLDERS: dict[str, Callable[[nn.Module, World, torch.dtype], Holder]] = {
    "whole": WholeHolder,
    "zero": ZeroHolder,
    "tensor": TensorHolder,
}
