"""World: the ranks of one process group, the student's or a teacher replica's."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megapd.errors import UserError

TIMEOUT = timedelta(minutes=10)
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The ranks of this run. `control` carries small host tensors (counts, flags) without touching the device."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup

    def sum(self, *values: int) -> list[int]:
        """Each value summed over the ranks; one host-side collective."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def on_first(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, which alone calls it, on every rank. Raises UserError on all ranks where it does."""
        outcome: tuple[Any, str | None] | None = None
        if self.rank == 0:
            try:
                outcome = function(), None
            except UserError as error:
                outcome = None, str(error)
        value, failure = self.gather(outcome)[0]
        if failure is not None:
            raise UserError(failure)
        return cast(T, value)

    def barrier(self) -> None:
        dist.barrier(group=self.control)


def join_world() -> World:
    """Join the ranks that the deepspeed launcher started, or be the one rank of a plain `megapd` command.

    On GPUs unless there is none or DS_ACCELERATOR is cpu. Raises UserError where this machine has fewer GPUs than ranks.
    """
    alone = "WORLD_SIZE" not in os.environ
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if cuda:
        local_rank, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= devices:
            raise UserError(f"rank {local_rank} of this machine has no GPU, there are {devices}: start fewer ranks")
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        # A lone rank needs no port that another run on the machine could hold.
        store = dist.HashStore() if alone else None  # type: ignore[attr-defined]
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=0 if alone else -1, world_size=1 if alone else -1, timeout=TIMEOUT
        )
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo"))


def init_deepspeed(world: World) -> None:
    """DeepSpeed's communication over the ranks that `join_world` joined. Imports deepspeed, which takes seconds."""
    import deepspeed
    import deepspeed.ops

    os.environ.setdefault("LOCAL_RANK", "0")  # the one variable that DeepSpeed asks for itself
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if world.device.type == "cpu":
        # DeepSpeed would build a shared-memory all-reduce with g++ at its first start on a CPU, up to 2.5 minutes, that only its
        # tensor-parallel inference uses.
        for name in ("deepspeed_shm_comm", "deepspeed_ccl_comm"):
            deepspeed.ops.__compatible_ops__[name] = False
    deepspeed.init_distributed("nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False)
