"""Batch: what a task gives for some rows of a step's global batch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Token ids with the positions to predict.

    ids         [B, L] int64
    segments    [B, L] int64, number of the document within its block, or None where attention sees the whole row
    positions   [N] int64, labelled positions, indices into the flattened B * L; increasing
    labels      [N] int64, the class to predict at each
    sample_ids  [B] int64, which sample of the task each row is
    """

    ids: Tensor
    segments: Tensor | None
    positions: Tensor
    labels: Tensor
    sample_ids: Tensor

    @property
    def samples(self) -> int:
        return self.ids.shape[0]

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def labelled(self) -> int:
        return self.positions.numel()

    @cached_property
    def digest(self) -> str:
        """Names what a teacher is asked: ids, document boundaries and labelled positions (not the labels)."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (self.ids, self.segments, self.positions):
            if tensor is None:
                digest.update(b"none")
            else:
                tensor = tensor.to("cpu", torch.int64).contiguous()
                digest.update(repr(tuple(tensor.shape)).encode())
                digest.update(tensor.numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device, with its digest where that is known: hashing there would copy the ids back."""
        moved = replace(
            self,
            ids=self.ids.to(device, non_blocking=True),
            segments=None if self.segments is None else self.segments.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )
        if "digest" in self.__dict__:
            moved.__dict__["digest"] = self.digest
        return moved
