"""The task `majority` and the model `signs`."""

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from megapd.batch import Batch
from megapd.models import Body, Parts
from megapd.rng import bits
from megapd_outside.settings import MajorityConfig, SignsConfig

TRAIN, HELDOUT = 1000, 1001  # streams of random numbers that megapd does not use


class Majority:
    """A megapd.tasks.Task."""

    vocab_size = classes = 2
    labelled_per_sample = 1.0
    heldout_samples = 1 << 20

    def __init__(self, section: MajorityConfig, seed: int, global_batch: int) -> None:
        self.length, self._voters = section.length, section.voters
        self._seed, self._global_batch = seed, global_batch
        self.data_digest = self.vocabulary_digest = hashlib.sha256(section.model_dump_json().encode()).hexdigest()

    def batch(self, step: int, rows: range) -> Batch:
        samples = step * self._global_batch + np.arange(rows.start, rows.stop)
        return self._build(self._seed, TRAIN, samples, samples)

    def heldout(self, rows: range) -> Batch:
        samples = np.arange(rows.start, rows.stop)
        return self._build(0, HELDOUT, samples, -1 - samples)

    def _build(self, seed: int, stream: int, samples: np.ndarray, sample_ids: np.ndarray) -> Batch:
        ids = (bits(seed, stream, samples[:, None], np.arange(self.length)) & np.uint64(1)).astype(np.int64)
        labels = (2 * ids[:, : self._voters].sum(1) > self._voters).astype(np.int64)
        return Batch(
            ids=torch.from_numpy(ids),
            segments=None,
            positions=torch.arange(1, len(ids) + 1) * self.length - 1,
            labels=torch.from_numpy(labels),
            sample_ids=torch.from_numpy(sample_ids),
        )


class Signs(Body):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, ids: Tensor, segments: Tensor | None = None) -> Tensor:
        return ((2 * ids - 1).to(self.scale.dtype) * self.scale).unsqueeze(1)

    def initialise(self, parameter: nn.Parameter, name: str, owner: nn.Module, generator: torch.Generator) -> None:
        if owner is self:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.1, generator=generator)


def build_signs(section: SignsConfig, *, vocab_size: int, classes: int, length: int) -> Parts:
    return Parts(Signs())
