"""How a teacher is held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megapd.signals import DTYPES
from megapd.world import World


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
