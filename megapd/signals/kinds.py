"""megapd's kinds of signals: dense, hidden, topk, sampled and argmax."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from megapd.batch import Batch
from megapd.registry import signal_kinds
from megapd.rng import Stream, uniform
from megapd.signals.signal import FLOATS, Answer, Column, Head, LossTargets, SignalKind, SignalSpec, TeacherOutput
from megapd_kernels import topk_logits


@signal_kinds.register("dense")
class Dense(SignalKind):
    """Logits [N, V]."""

    uses = ("encoding",)
    lossless = True

    def columns(self, spec: SignalSpec) -> tuple[Column, ...]:
        return (Column("values", "encoded", "classes"),)

    def answer(self, spec: SignalSpec, batch: Batch, output: TeacherOutput) -> Answer:
        return Answer(output.logits())

    def targets(self, answer: Answer, head: Head | None) -> LossTargets:
        return {"teacher_logits": answer.values}

    def values_per_position(self, classes: int, width: int, positions_per_rotation: float) -> float:
        return classes


@signal_kinds.register("hidden")
class Hidden(SignalKind):
    """Final hidden states [N, D]: all that the head multiplies, and it travels once a rotation."""

    uses = ("encoding",)
    encodings = (*FLOATS, "int8")
    lossless = True
    with_head = True

    def columns(self, spec: SignalSpec) -> tuple[Column, ...]:
        values = Column("values", "encoded", "width")
        return (values, Column("scale", "fp32", "one")) if spec.encoding == "int8" else (values,)

    def answer(self, spec: SignalSpec, batch: Batch, output: TeacherOutput) -> Answer:
        return Answer(output.hidden)

    def targets(self, answer: Answer, head: Head | None) -> LossTargets:
        assert head is not None  # Signal's own invariant
        return {"teacher_hidden": answer.values, "teacher_weight": head.weight, "teacher_bias": head.bias}

    def values_per_position(self, classes: int, width: int, positions_per_rotation: float) -> float:
        """`width` values a position, and the head, `classes` x `width`, once a rotation."""
        return width * (1.0 + classes / positions_per_rotation)


@signal_kinds.register("topk")
class TopK(SignalKind):
    """The likeliest classes: ids [N, k] by falling probability, their log probabilities, and the log of the others' mass [N]."""

    uses = ("encoding", "k", "temperature")
    default_k = 64
    distinct = True

    def columns(self, spec: SignalSpec) -> tuple[Column, ...]:
        return Column("values", "ids", "k"), Column("logprobs", "encoded", "k"), Column("log_rest", "encoded", "one")

    def answer(self, spec: SignalSpec, batch: Batch, output: TeacherOutput) -> Answer:
        hidden, head, shard, chunk_bytes = output
        top = topk_logits(
            hidden, head.weight, spec.k, bias=head.bias, temperature=spec.temperature, chunk_bytes=chunk_bytes, shard=shard
        )
        return Answer(top.ids, top.logprobs, top.log_rest)

    def targets(self, answer: Answer, head: Head | None) -> LossTargets:
        return {
            "teacher_ids": answer.values,
            "teacher_logprobs": answer.logprobs,
            "teacher_log_rest": answer.log_rest,
            "convention": "tail",
        }

    def likeliest(self, values: Tensor) -> Tensor:
        return values[:, 0]


@signal_kinds.register("sampled")
class Sampled(SignalKind):
    """Class ids [N, k], drawn with replacement from the teacher's distribution."""

    uses = ("k", "temperature", "seed")
    default_k = 12

    def columns(self, spec: SignalSpec) -> tuple[Column, ...]:
        return (Column("values", "ids", "k"),)

    def answer(self, spec: SignalSpec, batch: Batch, output: TeacherOutput) -> Answer:
        parts = [_draw(spec, batch, rows, output.logits(rows)) for rows in output.chunks()]
        return Answer(torch.cat(parts) if parts else output.hidden.new_empty((0, spec.k), dtype=torch.int64))

    def targets(self, answer: Answer, head: Head | None) -> LossTargets:
        ids = answer.values
        weights = torch.full(ids.shape, -math.log(ids.shape[1]), dtype=torch.float32, device=ids.device)
        return {"teacher_ids": ids, "teacher_logprobs": weights, "convention": "sampled"}


@signal_kinds.register("argmax")
class Argmax(SignalKind):
    """Ids [N] of the likeliest class: the teacher at temperature 0."""

    def columns(self, spec: SignalSpec) -> tuple[Column, ...]:
        return (Column("values", "ids", "one"),)

    def answer(self, spec: SignalSpec, batch: Batch, output: TeacherOutput) -> Answer:
        parts = [output.logits(rows).argmax(-1) for rows in output.chunks()]
        return Answer(torch.cat(parts) if parts else output.hidden.new_empty(0, dtype=torch.int64))

    def targets(self, answer: Answer, head: Head | None) -> LossTargets:
        return {"teacher_ids": answer.values}

    def likeliest(self, values: Tensor) -> Tensor:
        return values

    def exact(self, teacher_temperature: float, divergence: str) -> bool:
        """Of divergences that weigh classes by the teacher's probabilities alone."""
        return teacher_temperature == 0.0 and divergence in ("forward_kl", "soft_cross_entropy")

    def values_per_position(self, classes: int, width: int, positions_per_rotation: float) -> float:
        return 0.5  # an id takes no more bytes than a value, mostly half of them


def _draw(spec: SignalSpec, batch: Batch, rows: slice, logits: Tensor) -> Tensor:
    """Class ids [C, k] of `rows`, drawn with replacement from softmax(logits / temperature) by inversion of its distribution.

    A draw depends on the seed, the sample and the position within it alone, not on the batch that the sample is part of.
    """
    samples = np.repeat(np.arange(batch.samples), batch.counts)[rows]
    keys = batch.sample_digests.view(np.uint64).reshape(batch.samples, -1)[:, 0][samples]
    starts = np.cumsum(batch.counts) - batch.counts
    within = np.arange(rows.start, rows.stop) - starts[samples]
    counters = within[:, None] * spec.k + np.arange(spec.k)
    draws = torch.from_numpy(uniform(spec.seed, Stream.SAMPLED_SIGNAL, keys[:, None], counters)).to(logits.device)
    sums = torch.softmax(logits.double() / spec.temperature, -1).cumsum(-1)
    sums = sums / sums[:, -1:]  # the last is 1, so that every draw, which is below 1, falls into a class
    return torch.searchsorted(sums, draws, right=True).clamp_max_(logits.shape[1] - 1)
