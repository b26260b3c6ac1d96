"""Which rows of a global batch a rank and its micro-batches have: the same for a run and for the recording of its signals."""

from __future__ import annotations

from dataclasses import dataclass

from megapd.config import TrainingConfig
from megapd.errors import UserError


@dataclass(frozen=True)
class Tiling:
    """How the rows of a global batch fall to ranks and micro-batches; the rows themselves depend on neither."""

    global_batch: int
    micro_batch: int
    ranks: int

    @property
    def accumulation(self) -> int:
        return self.global_batch // (self.micro_batch * self.ranks)

    def rows(self, rank: int) -> list[range]:
        """The rows of each micro-batch of `rank`, in order."""
        starts = ((micro * self.ranks + rank) * self.micro_batch for micro in range(self.accumulation))
        return [range(start, start + self.micro_batch) for start in starts]


def tile(training: TrainingConfig, ranks: int) -> Tiling:
    """The tiling that a run's settings give `ranks` ranks; UserError where the batch does not divide."""
    if training.global_batch % ranks:
        raise UserError(
            f"training.global_batch: {training.global_batch} does not divide among {ranks} ranks; "
            f"set a multiple of {ranks}, or start another number of ranks"
        )
    micro = training.micro_batch or training.global_batch // ranks
    if training.global_batch % (micro * ranks):
        raise UserError(
            f"training.micro_batch: {micro} x {ranks} ranks does not divide training.global_batch {training.global_batch}; "
            f"use a divisor of {training.global_batch // ranks}"
        )
    return Tiling(training.global_batch, micro, ranks)
