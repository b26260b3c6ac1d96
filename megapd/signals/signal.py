"""Signal, a teacher's answer for a batch; SignalSpec, what a run asks for; SignalKind, what there is to be asked for, by name."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from typing import Any, ClassVar, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megapd.batch import Batch
from megapd.errors import SignalMismatch
from megapd.registry import signal_kinds
from megapd_kernels import VocabularyShard, default_chunk_bytes

Encoding = Literal["fp32", "bf16", "fp16", "int8"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
FLOATS: tuple[Encoding, ...] = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Head:
    """The teacher's output layer: weight [V, D], bias [V] or None. Travels once a rotation."""

    weight: Tensor
    bias: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Head:
        return Head(function(self.weight), None if self.bias is None else function(self.bias))

    def to(self, device: torch.device) -> Head:
        return self.map(lambda tensor: tensor.to(device))


class Answer(NamedTuple):
    """values, logprobs and log_rest of a Signal."""

    values: Tensor
    logprobs: Tensor | None = None
    log_rest: Tensor | None = None


class TeacherOutput(NamedTuple):
    """What a teacher computed for N labelled positions: hidden [N, D], and the head that turns them into logits.

    With a shard, `head` holds this rank's classes, and all ranks call alike. chunk_bytes: most bytes of logits that `chunks` lets
    be alive at once; None: the kernels' default.
    """

    hidden: Tensor
    head: Head
    shard: VocabularyShard | None = None
    chunk_bytes: int | None = None

    def logits(self, rows: slice = slice(None)) -> Tensor:
        """[.., V] of some positions, over all classes."""
        logits = F.linear(self.hidden[rows], self.head.weight, self.head.bias)
        return logits if self.shard is None else self.shard.whole(logits, 1)

    def chunks(self) -> Iterator[slice]:
        """The positions, as many at once as chunk_bytes allow."""
        classes = self.head.weight.shape[0] if self.shard is None else self.shard.total
        size = max(1, (self.chunk_bytes or default_chunk_bytes(self.hidden.device)) // (8 * classes))
        for start in range(0, self.hidden.shape[0], size):
            yield slice(start, min(start + size, self.hidden.shape[0]))


class LossTargets(TypedDict, total=False):
    """Arguments of megapd_kernels.linear_distillation_loss that say what the teacher says."""

    teacher_logits: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    teacher_ids: Tensor
    teacher_logprobs: Tensor | None
    teacher_log_rest: Tensor | None
    convention: Literal["tail", "sampled"]


class Column(NamedTuple):
    """A tensor of a signal as a record holds it.

    name    field of Signal
    holds   values in the spec's encoding; class ids; or fp32
    each    how many a position: one number, or a list of the spec's k, the teacher's classes, or its head's width
    """

    name: Literal["values", "scale", "logprobs", "log_rest"]
    holds: Literal["encoded", "ids", "fp32"]
    each: Literal["one", "k", "classes", "width"]


class SignalKind(ABC):
    """What a teacher can say about a position. Registered by `megapd.registry.signal_kinds`; its one object holds no state.

    uses         which fields of a SignalSpec matter to it, of encoding, k, temperature and seed
    encodings    those of its encoded columns
    default_k    where the run does not say; distinct: a position's k classes differ, so that there are no more than the head's
    lossless     the teacher's whole distribution follows from it: exact for every loss
    with_head    its values are the final hidden states, and the head travels beside it
    """

    uses: ClassVar[tuple[str, ...]] = ()
    encodings: ClassVar[tuple[Encoding, ...]] = FLOATS
    default_k: ClassVar[int] = 0
    distinct: ClassVar[bool] = False
    lossless: ClassVar[bool] = False
    with_head: ClassVar[bool] = False

    @abstractmethod
    def columns(self, spec: SignalSpec) -> tuple[Column, ...]:
        """The columns of a record, `values` first."""

    @abstractmethod
    def answer(self, spec: SignalSpec, batch: Batch, output: TeacherOutput) -> Answer:
        """See `SignalSpec.answer`."""

    @abstractmethod
    def targets(self, answer: Answer, head: Head | None) -> LossTargets:
        """What the student's head gives its loss; head: with `with_head` alone."""

    def likeliest(self, values: Tensor) -> Tensor | None:
        """The teacher's likeliest class [N] at each position, of a kind whose values are class ids; None: they do not tell."""
        return None

    def exact(self, teacher_temperature: float, divergence: str) -> bool:
        """Whether the loss is the same as with the teacher's whole distribution."""
        return self.lossless

    def values_per_position(self, classes: int, width: int, positions_per_rotation: float) -> float:
        """What it costs, in values a labelled position: `negotiate` takes the exact kind that costs least."""
        raise NotImplementedError(f"{type(self).__name__} is exact for a loss, and says not what it costs")

    def spec(self, name: str, encoding: Encoding, *, classes: int, k: int | None, temperature: float, seed: int) -> SignalSpec:
        """A spec of this kind with what matters to it of a run's settings; classes: of the teacher's head."""
        chosen = k or self.default_k
        k = min(chosen, classes) if self.distinct else chosen
        temperature = temperature if "temperature" in self.uses else 1.0
        return SignalSpec(name, encoding, k, temperature, seed if "seed" in self.uses else 0)


@cache
def definition_of(name: str) -> SignalKind:
    """The object of a kind. UserError if none is registered under that name."""
    kind: type[SignalKind] = signal_kinds.get(name)
    return kind()


@dataclass(frozen=True)
class SignalSpec:
    """What a run asks its teacher for; the same for every batch.

    kind         name of a registered SignalKind
    encoding     type of the values and log probabilities of kinds that have such; int8 for hidden alone
    k            classes of topk, draws of sampled; 0 for the other kinds
    temperature  the teacher's, of topk and sampled
    seed         of sampled: a draw is a pure function of (seed, sample, position)
    """

    kind: str
    encoding: Encoding = "fp32"
    k: int = 0
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        uses = self.definition.uses
        if (self.k > 0) != ("k" in uses):
            has = "needs at least 1" if "k" in uses else "has none"
            raise ValueError(f"k: {self.k} with kind {self.kind}, which {has}")
        if "temperature" in uses and not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature} with kind {self.kind}; choose argmax for 0")
        if self.encoding not in self.definition.encodings:
            what = "int8 is for hidden states, not" if self.encoding == "int8" else f"{self.encoding} is not"
            raise ValueError(f"encoding: {what} for {self.kind}; choose {self.definition.encodings[-1]}")

    @property
    def definition(self) -> SignalKind:
        """The object of the kind."""
        return definition_of(self.kind)

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        return self.definition.columns(self)

    @cached_property
    def parameters(self) -> str:
        """Canonical JSON of the kind and what matters to it: signals of equal parameters can stand for each other."""
        chosen: dict[str, Any] = {name: getattr(self, name) for name in self.definition.uses}
        return json.dumps({"kind": self.kind, **chosen}, sort_keys=True)

    @staticmethod
    @lru_cache(maxsize=64)
    def parse(parameters: str | bytes) -> SignalSpec:
        """The spec of what `parameters` returned; ValueError for anything else."""
        try:
            tree = json.loads(parameters)
        except RecursionError as error:
            raise ValueError("parameters: nested too deep") from error
        if not isinstance(tree, dict) or tree.keys() - {"kind", "encoding", "k", "temperature", "seed"}:
            raise ValueError("parameters: not those of a signal")
        kinds, encodings = signal_kinds.names(), tuple(DTYPES)
        if tree.get("kind") not in kinds or tree.get("encoding", "fp32") not in encodings:
            raise ValueError(f"parameters: kind must be one of {', '.join(kinds)}, encoding one of {', '.join(encodings)}")
        numbers = [tree.get("k", 0), tree.get("seed", 0), tree.get("temperature", 1.0)]
        if not all(type(number) is int for number in numbers[:2]) or type(numbers[2]) not in (int, float):
            raise ValueError("parameters: k and seed are integers, temperature is a number")
        if not 0 <= numbers[0] < 1 << 20 or not 0 <= numbers[1] < 1 << 63 or not 0 < numbers[2] < float("inf"):
            raise ValueError("parameters: k, seed or temperature out of range")
        return SignalSpec(**tree)

    def bytes_per_position(self, classes: int, width: int) -> float:
        """Bytes that the signal of one labelled position takes; for hidden without the head."""
        sizes = {"encoded": DTYPES[self.encoding].itemsize, "ids": id_type(classes).itemsize, "fp32": 4}
        numbers = {"one": 1, "k": self.k, "classes": classes, "width": width}
        return sum(numbers[column.each] * sizes[column.holds] for column in self.columns)

    @property
    def hides_nan(self) -> bool:
        """Whether its values are ids, which look right whatever the hidden states were."""
        return all(column.holds == "ids" for column in self.columns)

    @torch.no_grad()
    def answer(self, batch: Batch, output: TeacherOutput) -> Answer:
        """What is asked for about the labelled positions of `batch`. Every rank gets the whole answer."""
        return self.definition.answer(self, batch, output)


def negotiate(
    classes: int, width: int, teacher_temperature: float, divergence: str, positions_per_rotation: float = float("inf")
) -> str:
    """The cheapest kind that is exact for the loss: argmax where it alone counts, else logits or hidden states."""
    exact = [name for name in signal_kinds.names() if definition_of(name).exact(teacher_temperature, divergence)]
    return min(exact, key=lambda name: definition_of(name).values_per_position(classes, width, positions_per_rotation))


def id_type(classes: int) -> np.dtype[Any]:
    """Of class ids below `classes`, in a record."""
    return np.dtype(np.uint16 if classes <= 1 << 16 else np.uint32)


# --------------------------------------------------------------------------------------------------------- the answer


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
    doubt     of ids alone, as the teacher itself gives them: a scalar on its device, 0, or NaN where the hidden states behind
              them were not finite. It is added to the student's loss, so that nobody has to wait for the device to look
    """

    spec: SignalSpec
    teacher: str
    samples: str
    values: Tensor
    head: Head | None = None
    logprobs: Tensor | None = None
    log_rest: Tensor | None = None
    scale: Tensor | None = None
    doubt: Tensor | None = None

    def __post_init__(self) -> None:
        with_head = self.spec.definition.with_head
        assert with_head == (self.head is not None), "hidden states travel with a head, other kinds without"
        names = {column.name for column in self.spec.columns}
        assert all((getattr(self, name) is not None) == (name in names) for name in ("logprobs", "log_rest"))

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

    def finite(self) -> bool:
        """Whether all of it are numbers: no NaN, no +inf, and no position without any class. -inf is a class of probability 0,
        but nothing that a hidden state may be. Waits for the device; a reduction (9 ms of 100 MB on a core, isfinite 210)."""
        columns = [t for t in (self.values, self.logprobs, self.log_rest, self.scale, self.doubt) if t is not None and t.numel()]
        for tensor in columns:
            if not tensor.is_floating_point():
                continue
            if self.spec.definition.with_head:
                bounds = torch.stack(tensor.aminmax())
            else:  # of log_rest, -inf alone says that the classes named have all of the mass
                bounds = tensor.amax(-1) if tensor.ndim == 2 else tensor.amax().clamp_min(0.0)
            if not bool(bounds.isfinite().all()):
                return False
        return True

    def to(self, device: torch.device) -> Signal:
        """The same signal on a device; the head stays where it is, since it moves once a rotation."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> Signal:
        """With each tensor but the head's changed; their first dimension is the positions."""
        logprobs, log_rest, scale = (None if t is None else change(t) for t in (self.logprobs, self.log_rest, self.scale))
        return replace(self, values=change(self.values), logprobs=logprobs, log_rest=log_rest, scale=scale)


def not_finite(teacher_step: int) -> str:
    """What to say of a signal that is not `finite`."""
    fix = "`megapd trajectory verify` reads its weights; choose another teacher.precision, or leave the checkpoint out"
    return f"the signal of the teacher's step {teacher_step} holds NaN or an infinity; {fix}"


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
