"""Replica: a teacher in a world of its own, asked by one rank and answered by all.

Rank 0 serves; the others follow its commands, which travel over the control group together with the batch they are about. They
hash the ids that they received, so that a broken broadcast cannot pass for another batch.
"""

from __future__ import annotations

import logging
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megapd.batch import Batch
from megapd.signals import Head, Signal, SignalSpec
from megapd.teacher.engine.options import TeacherOptions
from megapd.teacher.engine.teacher import Teacher
from megapd.trajectory import Checkpoints
from megapd.world import World

log = logging.getLogger(__name__)


class Replica:
    """What a server asks. `trajectory` and `prepare` from any thread, the rest from one thread of rank 0.

    `follow` is what the other ranks do meanwhile.
    """

    def __init__(self, trajectory: Checkpoints, world: World, options: TeacherOptions) -> None:
        self.trajectory = trajectory
        self._world = world
        self._teacher = Teacher(trajectory, world, options)
        self._to_prepare: deque[int] = deque()

    def open(self, step: int) -> None:
        """Build the model that the checkpoint of `step` describes; on all ranks together, before anything else."""
        self._teacher.open(step)

    def prepare(self, step: int) -> Future[Any]:
        """Stage this rank's parts of a checkpoint. The other ranks stage theirs when rank 0's next command reaches them."""
        if self._world.size > 1:
            self._to_prepare.append(step)
        return self._teacher.prepare(step)

    @property
    def held(self) -> tuple[str, ...]:
        """Digests of the checkpoints in memory, the last used at the end."""
        return self._teacher.resident

    @property
    def classes(self) -> int:
        return self._teacher.classes

    def signal(self, step: int, batch: Batch, spec: SignalSpec) -> Signal:
        """The signal of teacher step `step` for `batch`, packed or not, on the host."""
        self._command("signal", step, batch, spec)
        self._agree(batch.digest, batch.digest)
        return self._signal(step, batch, spec)

    def head(self, step: int) -> Head:
        self._command("head", step)
        self._teacher.rotate(step)
        return self._teacher.head().to(torch.device("cpu"))

    def idle(self) -> None:
        """Keeps the other ranks' wait for a command short of the group's time-out, and lets them stage what was asked for."""
        self._command("idle")

    def close(self) -> None:
        self._command("close")
        self._teacher.close()

    def follow(self) -> None:
        """Obey rank 0 until it closes. What fails on one rank fails on all, and rank 0 tells; so errors are logged and left."""
        assert self._world.rank > 0
        while True:
            received: list[Any] = [None]
            dist.broadcast_object_list(received, 0, group=self._world.control)
            name, prepare, step, batch, spec, digest = received[0]
            for ahead in prepare:
                self._teacher.prepare(ahead)
            if name == "close":
                self._teacher.close()
                return
            if name == "idle":
                continue
            try:
                if name == "signal":
                    self._agree(replace(batch).digest, digest)  # without the digests that it was sent with
                    self._signal(step, batch, spec)
                else:
                    self._teacher.rotate(step)
                    self._teacher.head()
            except Exception as error:
                log.error("rank %d: %s of the teacher's step %s failed: %s", self._world.rank, name, step, error)

    def _agree(self, received: str, digest: str) -> None:
        """RuntimeError on every rank unless all received the batch that `digest` names."""
        if self._world.sum(int(received != digest))[0]:
            raise RuntimeError(f"the ranks of this replica did not receive the same batch {digest}")

    def _command(self, name: str, step: int = 0, batch: Batch | None = None, spec: SignalSpec | None = None) -> None:
        if self._world.size > 1:
            prepare = [self._to_prepare.popleft() for _ in range(len(self._to_prepare))]
            digest = None if batch is None else batch.digest
            dist.broadcast_object_list([(name, prepare, step, batch, spec, digest)], 0, group=self._world.control)

    def _signal(self, step: int, batch: Batch, spec: SignalSpec) -> Signal:
        self._teacher.rotate(step)
        if self._world.size > 1 and self._teacher.options.sharding == "zero":
            return self._shared_out(batch, spec)
        return self._teacher.signal(batch.to(self._world.device), spec, common=True).to(torch.device("cpu"))

    def _shared_out(self, batch: Batch, spec: SignalSpec) -> Signal:
        """Each rank answers some of the samples; rank 0 has the whole signal, the others their own part."""
        rank, size, device = self._world.rank, self._world.size, self._world.device
        bounds = [batch.samples * number // size for number in range(size + 1)]
        counts = [int(batch.counts[first:last].sum()) for first, last in pairwise(bounds)]
        mine = slice(bounds[rank], bounds[rank + 1])
        # A rank without samples answers the first one all the same: ZeRO-3 gathers parameters on all ranks or on none.
        signal = self._teacher.signal(batch.select(mine if mine.start < mine.stop else slice(0, 1)).to(device), spec)

        def collect(part: Tensor) -> Tensor:
            padded = part.new_zeros(max(counts), *part.shape[1:])
            padded[: counts[rank]] = part[: counts[rank]]
            parts = [torch.empty_like(padded) for _ in range(size)] if rank == 0 else None
            dist.gather(padded, parts, dst=0)
            return torch.cat([found[:count] for found, count in zip(parts or [padded], counts, strict=False)]).cpu()

        return replace(signal.map(collect), samples=batch.digest)
