"""Carried out of megapd/signal.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megapd.batch import Batch
from megapd.errors import RunFailed
from megapd.signals.spec import DTYPES, Encoding, Kind, SignalSpec


class SignalMismatch(RunFailed):
    """A signal of another teacher, or for other tokens, than the step asks for."""


class SignalDamaged(RuntimeError):
    """A record whose bytes are not those that were written."""


@dataclass(frozen=True)
class Head:
    """The teacher's output layer: weight [V, D], bias [V] or None. Travels once a rotation."""

    weight: Tensor
    bias: Tensor | None

    def to(self, device: torch.device) -> Head:
        return Head(self.weight.to(device), None if self.bias is None else self.bias.to(device))


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
        assert (self.kind == "hidden") == (self.head is not None), "hidden states travel with a head, other kinds without"
        assert (self.kind == "topk") == (self.logprobs is not None) == (self.log_rest is not None)

    @property
    def kind(self) -> Kind:
        return self.spec.kind

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


# ------------------------------------------------------------------------------------------------------------- signals


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
    if signal.kind == "topk":
        assert signal.logprobs is not None
        assert signal.log_rest is not None
        dtype = DTYPES[signal.spec.encoding]
        return replace(signal, logprobs=signal.logprobs.to(dtype), log_rest=signal.log_rest.to(dtype))
    if signal.kind not in ("dense", "hidden") or signal.scale is not None:
        return signal
    values, scale = quantize(signal.values, signal.spec.encoding)
    return replace(signal, values=values, scale=scale)


def as_sent(signal: Signal) -> Signal:
    """The signal as a student decodes it: rounded to its encoding, so that all carriers give the same values."""
    packed = pack(signal)
    return packed if packed.scale is None else replace(packed, values=_product(packed.values, packed.scale), scale=None)


def _product(steps: Tensor, scale: Tensor) -> Tensor:
    # In place, which takes a third of the time of a product apart: both allocate, and large memory is new to the process.
    return steps.float().mul_(scale[:, None])
