"""What trains."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitcount.settings import BitCountConfig, HalvesConfig, SignsConfig
from megapd.batch import Batch
from megapd.models import Body, Parts
from megapd.training import Callback, Run, StepResult, Tracker


class BitCount:
    """Random bits [B, length]; their label is at the last position."""

    vocab_size = 2
    labelled_per_sample = 1.0
    heldout_samples = 4096

    def __init__(self, settings: BitCountConfig, seed: int, global_batch: int) -> None:
        self.length, self.classes = settings.length, settings.classes
        self.vocabulary_digest = self.data_digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()
        self._seed, self._global_batch = seed, global_batch

    def batch(self, step: int, rows: range) -> Batch:
        bits = np.random.default_rng([self._seed, step]).integers(0, 2, (self._global_batch, self.length))
        return self._labelled(bits, rows, step * self._global_batch + np.arange(rows.start, rows.stop))

    def heldout(self, rows: range) -> Batch:
        bits = np.random.default_rng(0).integers(0, 2, (self.heldout_samples, self.length))
        return self._labelled(bits, rows, -1 - np.arange(rows.start, rows.stop))

    def _labelled(self, bits: np.ndarray, rows: range, samples: np.ndarray) -> Batch:
        ids = torch.from_numpy(bits[rows.start : rows.stop])
        last = torch.arange(1, len(ids) + 1) * self.length - 1
        return Batch(ids, None, last, ids.sum(1) % self.classes, torch.from_numpy(samples))


class Signs(Body):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, ids: Tensor, segments: Tensor | None = None) -> Tensor:
        return ((2 * ids - 1).to(self.scale.dtype) * self.scale).unsqueeze(1)

    def initialise(self, parameter: nn.Parameter, name: str, owner: nn.Module, generator: torch.Generator) -> None:
        if owner is self:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.1, generator=generator)


def signs(settings: SignsConfig, *, vocab_size: int, classes: int, length: int) -> Parts:
    return Parts(Signs(length))


def halves(settings: HalvesConfig, there: tuple[int, ...], steps: int) -> tuple[list[tuple[int, int]], list[str]]:
    return [(0, there[0]), (steps // 2, there[-1])], []


class MeanLabelled(Callback):
    """Adds the mean labelled positions of a step to the run's metrics, over resumptions."""

    def __init__(self) -> None:
        self._labelled = 0

    def after_step(self, run: Run, result: StepResult) -> None:
        self._labelled += result.labelled
        if result.metrics is not None:
            result.metrics["mean_labelled"] = self._labelled / result.step

    def state_dict(self) -> dict[str, Any]:
        return {"labelled": self._labelled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._labelled = state["labelled"]


class Lines(Tracker):
    """Each line of metrics again, in lines.txt."""

    def __init__(self, run: Run) -> None:
        self._path = run.config.folder / "lines.txt"

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps([kind, step, sorted(values)]) + "\n")
