"""Signal: a teacher's answer for one batch, and how its values are rounded to the encoding that carries them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megapd.batch import Batch
from megapd.errors import SignalMismatch
from megapd.signals.spec import DTYPES, Answer, Encoding, Head, LossTargets, SignalSpec


@dataclass(frozen=True)
class Signal:
    """One teacher's answer for the labelled positions of one batch.

    spec      what was asked for
    teacher   digest of the checkpoint that answered
    samples   digest of the batch it answers (Batch.digest)
    values    dense: logits [N, V]; hidden: final hidden states [N, D]; topk, sampled: class ids [N, K] int64; argmax: [N] int64;
              N = the batch's labelled positions
    head      for hidden alone
    logprobs  for topk alone [N, K]: log probabilities of the classes; log_rest [N]: log of the mass of the others
    scale     of packed int8 alone (`pack`), float32 [N]: `values` are the integers that it is to be multiplied with
    """

    spec: SignalSpec
    teacher: str
    samples: str
    values: Tensor
    head: Head | None = None
    logprobs: Tensor | None = None
    log_rest: Tensor | None = None
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        with_head = self.spec.definition.with_head
        assert with_head == (self.head is not None), "hidden states travel with a head, other kinds without"
        names = {column.name for column in self.spec.columns}
        assert all((getattr(self, name) is not None) == (name in names) for name in ("logprobs", "log_rest"))

    @property
    def kind(self) -> str:
        return self.spec.kind

    @property
    def targets(self) -> LossTargets:
        """What the student's head gives its loss."""
        return self.spec.definition.targets(Answer(self.values, self.logprobs, self.log_rest), self.head)

    def check(self, teacher: str, batch: Batch) -> None:
        """Raise SignalMismatch unless this signal is `teacher`'s answer for `batch`."""
        if self.teacher != teacher:
            raise SignalMismatch(f"signal of teacher {self.teacher}, but the schedule names {teacher}")
        if self.samples != batch.digest:
            raise SignalMismatch(f"signal for batch {self.samples}, but this batch is {batch.digest}")
        if self.values.shape[0] != batch.labelled:
            raise SignalMismatch(f"signal for {self.values.shape[0]} positions, but the batch labels {batch.labelled}")

    def to(self, device: torch.device) -> Signal:
        """The same signal on a device; the head stays where it is, since it moves once a rotation."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> Signal:
        """With each tensor but the head's changed; their first dimension is the positions."""
        logprobs, log_rest, scale = (None if t is None else change(t) for t in (self.logprobs, self.log_rest, self.scale))
        return replace(self, values=change(self.values), logprobs=logprobs, log_rest=log_rest, scale=scale)


def quantize(values: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor | None]:
    """(values in the encoding's type, scale float32 [N] for int8 or None); values [N, D] floating point."""
    if encoding != "int8":
        return values.to(DTYPES[encoding]), None
    # The scale has 16 significant bits: its products with up to 127 are exact, so that to quantize what was quantized changes
    # nothing.
    scale = values.abs().amax(-1).float() / 127.0
    rounded = ((scale.view(torch.int32) + 0xFF) & ~0xFF).view(torch.float32)
    scale = torch.where(scale.isfinite(), rounded, scale)  # the sum of a GPU's NaN, 0x7fffffff, would be finite
    steps = (values.float() / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_().clamp_(-127, 127)
    return steps.to(torch.int8), scale


def pack(signal: Signal) -> Signal:
    """The signal in the types of its encoding, as a record holds it; what is packed, or was rounded before, keeps its values.

    int8 as integers and scale: it is rounded where the values are, once (18 ms a 6 MiB signal on a core), and moves in a byte a
    value.
    """
    if signal.scale is not None:
        return signal
    encoding, columns = signal.spec.encoding, signal.spec.columns
    if encoding == "int8":
        values, scale = quantize(signal.values, encoding)
        return replace(signal, values=values, scale=scale)
    rounded = {c.name: getattr(signal, c.name).to(DTYPES[encoding]) for c in columns if c.holds == "encoded"}
    return replace(signal, **rounded)


def as_sent(signal: Signal) -> Signal:
    """The signal as a student decodes it: rounded to its encoding, so that all carriers give the same values."""
    packed = pack(signal)
    return packed if packed.scale is None else replace(packed, values=product(packed.values, packed.scale), scale=None)


def product(steps: Tensor, scale: Tensor) -> Tensor:
    """The values [N, D] of integers [N, D] and their scale [N]."""
    # In place, which takes a third of the time of a product apart: both allocate, and large memory is new to the process.
    return steps.float().mul_(scale[:, None])
