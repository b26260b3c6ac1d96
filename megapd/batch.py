"""Batch: what a task gives for some rows of a step's global batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Batch:
    """Token ids with the positions to predict.

    ids         [B, L] int64
    segments    [B, L] int64, number of the document within its block, or None where attention sees the whole row
    positions   [N] int64, labelled positions, indices into the flattened B * L; increasing
    labels      [N] int64, the class to predict at each
    sample_ids  [B] int64, which sample of the task each row is
    lengths     [B] int64, tokens of each row, at least 1, or None where all rows are full. What follows them is padding: any ids,
                nothing labelled, and attention and digests leave it out, so that what a row is does not depend on how far it
                is padded
    """

    ids: Tensor
    segments: Tensor | None
    positions: Tensor
    labels: Tensor
    sample_ids: Tensor
    lengths: Tensor | None = None

    @property
    def samples(self) -> int:
        return self.ids.shape[0]

    @property
    def tokens(self) -> int:
        """With those that pad."""
        return self.ids.numel()

    @property
    def labelled(self) -> int:
        return self.positions.numel()

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Labelled positions of each sample, int64 [B], on the host."""
        starts = np.arange(self.samples + 1) * self.ids.shape[1]
        return np.diff(np.searchsorted(self.positions.numpy(force=True), starts))

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """Of each labelled position, its place within its sample, int64 [N], on the host."""
        starts = np.arange(self.samples) * self.ids.shape[1]
        return self.positions.numpy(force=True) - np.repeat(starts, self.counts)

    @cached_property
    def sample_digests(self) -> NDArray[np.void]:
        """What a teacher is asked about each sample, 16 bytes of blake2b [B]: its ids, document boundaries and labelled positions
        (not the labels). They do not depend on the batch that a sample is part of."""
        rows = [_bytes(tensor.numpy(force=True)) for tensor in (self.ids, self.segments) if tensor is not None]
        positions = _bytes(self.places)
        lengths = [self.ids.shape[1]] * self.samples if self.lengths is None else self.lengths.tolist()
        opened = {n: hashlib.blake2b(f"{n} {len(rows)} ".encode(), digest_size=DIGEST_BYTES) for n in set(lengths)}
        digests = []
        ends = [0, *(8 * np.cumsum(self.counts)).tolist()]
        width = 8 * self.ids.shape[1]
        for sample, (length, (first, last)) in enumerate(zip(lengths, pairwise(ends), strict=True)):
            digest = opened[length].copy()
            for row in rows:
                digest.update(row[width * sample : width * sample + 8 * length])
            digest.update(positions[first:last])
            digests.append(digest.digest())
        return np.frombuffer(b"".join(digests), dtype=f"V{DIGEST_BYTES}")

    @cached_property
    def digest(self) -> str:
        """Names what a teacher is asked: hexadecimal blake2b of the samples' digests, in order."""
        return hashlib.blake2b(self.sample_digests.tobytes(), digest_size=DIGEST_BYTES).hexdigest()

    def select(self, rows: slice) -> Batch:
        """Some samples, rows[start:stop]; a view."""
        start, stop, step = rows.indices(self.samples)
        assert step == 1
        first, last = int(self.counts[:start].sum()), int(self.counts[:stop].sum())
        return Batch(
            ids=self.ids[start:stop],
            segments=None if self.segments is None else self.segments[start:stop],
            positions=self.positions[first:last] - start * self.ids.shape[1],
            labels=self.labels[first:last],
            sample_ids=self.sample_ids[start:stop],
            lengths=None if self.lengths is None else self.lengths[start:stop],
        )

    @staticmethod
    def concatenate(batches: Sequence[Batch]) -> Batch:
        """The samples of several batches as one, with their digests where each is known. They must be of one width, all or none
        with segments, all or none with lengths."""
        width = batches[0].ids.shape[1]
        starts = np.cumsum([0, *(batch.ids.numel() for batch in batches[:-1])]).tolist()
        assert all(batch.ids.shape[1] == width for batch in batches)
        segments = [batch.segments for batch in batches if batch.segments is not None]
        lengths = [batch.lengths for batch in batches if batch.lengths is not None]
        assert {len(segments), len(lengths)} <= {0, len(batches)}
        joined = Batch(
            ids=torch.cat([batch.ids for batch in batches]),
            segments=torch.cat(segments) if segments else None,
            positions=torch.cat([batch.positions + start for batch, start in zip(batches, starts, strict=True)]),
            labels=torch.cat([batch.labels for batch in batches]),
            sample_ids=torch.cat([batch.sample_ids for batch in batches]),
            lengths=torch.cat(lengths) if lengths else None,
        )
        if all("sample_digests" in batch.__dict__ for batch in batches):
            joined.__dict__["sample_digests"] = np.concatenate([batch.sample_digests for batch in batches])
        return joined

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device, with its digests where they are known: hashing there would copy the ids back."""
        moved = replace(
            self,
            ids=self.ids.to(device, non_blocking=True),
            segments=None if self.segments is None else self.segments.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            lengths=None if self.lengths is None else self.lengths.to(device, non_blocking=True),
        )
        moved.__dict__.update({key: self.__dict__[key] for key in ("counts", "sample_digests", "digest") if key in self.__dict__})
        return moved


def _bytes(values: NDArray[np.int64]) -> memoryview:
    """As little-endian 64-bit integers; slices of a memoryview cost a third of an array's."""
    return np.ascontiguousarray(values.astype("<i8", copy=False)).reshape(-1).view(np.uint8).data
