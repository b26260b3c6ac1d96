"""One of two ranks under fully_shard, whose rows are its own: run by test_nn.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from megapd_kernels.compat.conventions import head_of
from megapd_kernels.compat.trl import chunked_divergence_loss
from megapd_kernels.nn import LinearDistillation

N, V, D, E, WORLD = 7, 12, 6, 5, 2
WRAPPED = ("loss", "head", "both")


def rows(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(N, D, generator=generator), torch.randn(N, E, generator=generator)


def heads() -> tuple[LinearDistillation, Tensor]:
    torch.manual_seed(5)
    return LinearDistillation(D, V, bias=True, divergence="jsd"), torch.randn(V, E)


def whole(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def main(rank: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    hidden, teacher_hidden = rows(rank)
    found: dict[str, tuple[Tensor, ...]] = {}
    for wrapped in WRAPPED:
        loss, teacher_weight = heads()
        if wrapped != "loss":
            fully_shard(loss.head, mesh=mesh)
        if wrapped != "head":
            fully_shard(loss, mesh=mesh)
        value = loss(hidden, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight).loss
        value.backward()
        assert loss.head is not None
        found[wrapped] = (value.detach(), whole(loss.head.weight.grad), whole(loss.head.bias.grad))
    loss, teacher_weight = heads()
    assert loss.head is not None
    split, teacher_split = (distribute_tensor(w.detach(), mesh, [Shard(0)]) for w in (loss.head.weight, teacher_weight))
    mask = torch.ones(1, N)
    value, _, _ = chunked_divergence_loss(hidden[None], teacher_hidden[None], split, teacher_split, mask, 0.5)
    found["chunked_divergence_loss"] = (value,)

    class Model(torch.nn.Module):
        def get_output_embeddings(self) -> torch.nn.Module:
            assert loss.head is not None
            return loss.head

    fully_shard(loss.head, mesh=mesh)
    with pytest.raises(ValueError, match=r"^model: the head's weight is a DTensor \(FSDP\); gather it"):
        head_of(Model())
    torch.save(found, Path(folder, f"rank{rank}.pt"))
    torch.distributed.destroy_process_group()
