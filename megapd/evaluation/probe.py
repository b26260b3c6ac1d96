"""The probe loss: a checkpoint's cross entropy on held-out samples that are the same for the whole trajectory."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megapd.config import Config, public_tree
from megapd.errors import UserError
from megapd.files import machine_cache, write_atomic
from megapd.models import checkpoint_shape, load_teacher
from megapd.tasks import build_task
from megapd.trajectory import Checkpoint

SAMPLES = 16  # a forward pass


class TaskProbe:
    """Mean cross entropy [nats a label] of the first `samples` held-out samples of the configuration's task, in fp32.

    What was measured is kept on this machine in XDG_CACHE_HOME/megapd/probes (default ~/.cache), under the digests of weights and
    data, the task and the samples: a probe that was stopped goes on, and the same one again reads.
    """

    def __init__(self, config: Config, samples: int) -> None:
        """Raises UserError where the task has fewer samples."""
        self._task = build_task(config)
        if not 1 <= samples <= self._task.heldout_samples:
            raise UserError(f"probe: {samples} samples asked for, the task holds out {self._task.heldout_samples}; ask for fewer")
        self._samples = samples
        self._settings = json.dumps(public_tree(config)["task"], sort_keys=True)

    def __call__(self, trajectory: Any, checkpoint: Checkpoint) -> float:
        """Raises UserError for a checkpoint whose vocabulary is not proved to be the task's."""
        if not checkpoint.speaks(self._task.vocabulary_digest):
            fix = "name the task that it was trained on, or prepare a corpus with its tokenizer (megapd prepare CONFIG --like)"
            raise UserError(f"{checkpoint.path}: trained on another vocabulary than the task has; {fix}")
        file = self._file(checkpoint)
        try:
            return float(json.loads(file.read_bytes())["loss"])
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or damaged: measured again
            loss = self._measured(trajectory, checkpoint)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps({"loss": loss, "weights": checkpoint.digest, "samples": self._samples}))
        return loss

    def _file(self, checkpoint: Checkpoint) -> Path:
        key = " ".join([checkpoint.digest, self._task.data_digest, self._settings, str(self._samples)])
        return machine_cache("probes") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    @torch.no_grad()
    def _measured(self, trajectory: Any, checkpoint: Checkpoint) -> float:
        model = load_teacher(trajectory, checkpoint)
        classes = checkpoint_shape(checkpoint).classes
        total, count = 0.0, 0
        for start in range(0, self._samples, SAMPLES):
            batch = self._task.heldout(range(start, min(start + SAMPLES, self._samples)))
            logits: Tensor = model(batch, mode="logits")
            total += cross_entropy(logits[:, :classes].float(), batch.labels, reduction="sum").item()
            count += batch.labels.numel()
        return total / count
