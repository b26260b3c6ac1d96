"""Signal: what a teacher says about a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megapd.batch import Batch

Kind = Literal["dense", "hidden", "argmax"]


class SignalMismatch(RuntimeError):
    """A signal of another teacher, or for other tokens, than the step asks for."""


@dataclass(frozen=True)
class Head:
    """The teacher's output layer: weight [V, D], bias [V] or None. Travels once a rotation."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Signal:
    """One teacher's answer for the labelled positions of one batch.

    kind      dense: values are logits [N, V]; hidden: final hidden states [N, D], with `head`; argmax: class ids [N] int64
    teacher   digest of the checkpoint that answered
    samples   digest of the batch it answers (Batch.digest)
    values    as the kind says, N = the batch's labelled positions
    head      for hidden alone
    """

    kind: Kind
    teacher: str
    samples: str
    values: Tensor
    head: Head | None = None

    def __post_init__(self) -> None:
        assert (self.kind == "hidden") == (self.head is not None), "hidden states travel with a head, other kinds without"

    def check(self, teacher: str, batch: Batch) -> None:
        """Raise SignalMismatch unless this signal is `teacher`'s answer for `batch`."""
        if self.teacher != teacher:
            raise SignalMismatch(f"signal of teacher {self.teacher}, but the schedule names {teacher}")
        if self.samples != batch.digest:
            raise SignalMismatch(f"signal for batch {self.samples}, but this batch is {batch.digest}")
        if self.values.shape[0] != batch.labelled:
            raise SignalMismatch(f"signal for {self.values.shape[0]} positions, but the batch labels {batch.labelled}")


def negotiate(classes: int, width: int, teacher_temperature: float, divergence: str) -> Kind:
    """The cheapest kind that is exact for the loss: argmax where it alone counts, else logits or hidden states."""
    if teacher_temperature == 0.0 and divergence in ("forward_kl", "soft_cross_entropy"):
        return "argmax"
    return "dense" if classes <= width else "hidden"
