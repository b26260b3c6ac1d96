"""From hidden states and a head to what a signal holds: logits, the top k, draws, the argmax."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megapd.batch import Batch
from megapd.rng import Stream, uniform
from megapd.signals.signal import Head
from megapd.signals.spec import SignalSpec
from megapd_kernels import VocabularyShard, default_chunk_bytes, topk_logits


class Answer(NamedTuple):
    """values, logprobs and log_rest of a Signal."""

    values: Tensor
    logprobs: Tensor | None = None
    log_rest: Tensor | None = None


@torch.no_grad()
def answer(
    spec: SignalSpec,
    batch: Batch,
    hidden: Tensor,
    head: Head,
    shard: VocabularyShard | None = None,
    chunk_bytes: int | None = None,
) -> Answer:
    """What `spec` asks for, from hidden states [N, D]; with a shard, `head` holds this rank's classes and all ranks call alike.

    Except for dense, of logits at most chunk_bytes exist at once. Every rank gets the whole answer.
    """
    if spec.kind == "hidden":
        return Answer(hidden)
    if spec.kind == "topk":
        top = topk_logits(
            hidden, head.weight, spec.k, bias=head.bias, temperature=spec.temperature, chunk_bytes=chunk_bytes, shard=shard
        )
        return Answer(top.ids, top.logprobs, top.log_rest)
    if spec.kind == "dense":
        return Answer(_gather(F.linear(hidden, head.weight, head.bias), shard))
    parts = []
    for rows, logits in _chunks(hidden, head, shard, chunk_bytes):
        parts.append(logits.argmax(-1) if spec.kind == "argmax" else _draw(spec, batch, rows, logits))
    empty = hidden.new_empty((0,) if spec.kind == "argmax" else (0, spec.k), dtype=torch.int64)
    return Answer(torch.cat(parts) if parts else empty)


def _chunks(hidden: Tensor, head: Head, shard: VocabularyShard | None, chunk_bytes: int | None) -> Iterator[tuple[slice, Tensor]]:
    """(positions, their logits over all classes)."""
    classes = head.weight.shape[0] if shard is None else shard.total
    size = max(1, (chunk_bytes or default_chunk_bytes(hidden.device)) // (8 * classes))
    for start in range(0, hidden.shape[0], size):
        rows = slice(start, min(start + size, hidden.shape[0]))
        yield rows, _gather(F.linear(hidden[rows], head.weight, head.bias), shard)


def _gather(logits: Tensor, shard: VocabularyShard | None) -> Tensor:
    """[N, V] of all classes from [N, classes of this rank]."""
    return logits if shard is None else shard.whole(logits, 1)


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
