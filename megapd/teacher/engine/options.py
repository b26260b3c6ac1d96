"""How a teacher is held, and what a student's task demands of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megapd.errors import UserError
from megapd.models import checkpoint_shape
from megapd.signals import DTYPES
from megapd.trajectory import Checkpoint
from megapd.world import World


@dataclass(frozen=True)
class Demands:
    """What the student's task demands of a teacher; None: nothing, where clients check (a server).

    vocabulary        digest that a checkpoint must have
    same_vocabulary   a checkpoint that has none is trusted
    length            tokens a sample
    """

    vocabulary: str | None = None
    same_vocabulary: bool = False
    length: int | None = None

    def check(self, checkpoint: Checkpoint) -> None:
        """UserError unless the checkpoint can teach the task."""
        if self.vocabulary is not None and not (self.same_vocabulary and not checkpoint.vocabulary):
            if not checkpoint.vocabulary:
                raise UserError(
                    f"teacher.same_vocabulary: {checkpoint.path} does not say which tokenizer it was trained with; "
                    "if its ids mean what the task's do, set this to true"
                )
            if checkpoint.vocabulary != self.vocabulary:
                raise UserError(
                    f"teacher.trajectory: {checkpoint.path} has vocabulary {checkpoint.vocabulary[:12]}, but the student's "
                    f"task has {self.vocabulary[:12]}; teacher and student need the same tokenizer or task parameters"
                )
        length = checkpoint_shape(checkpoint).length
        if self.length is not None and length is not None and length < self.length:
            raise UserError(
                f"teacher.trajectory: the teacher was trained on {length} tokens a sample, "
                f"the student's task has {self.length}; shorten corpus.block_length, or choose another teacher"
            )


@dataclass(frozen=True)
class TeacherOptions:
    """How a teacher is held; see TeacherConfig.

    chunk_bytes   most bytes of logits alive at once; None: the kernels' default
    wait_seconds  how long `rotate` waits for a checkpoint that is still to be written; None: it must be there
    """

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    sharding: Literal["whole", "zero", "tensor"] = "whole"
    resident: int = 1
    chunk_bytes: int | None = None
    wait_seconds: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def sharded(self, world: World) -> bool:
        """Whether ranks share its weights, and then have to call alike."""
        return self.sharding != "whole" and world.size > 1
