"""The probe loss: a checkpoint's cross entropy on held-out samples that are the same for the whole trajectory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megapd.config import Config
from megapd.errors import UserError
from megapd.models import HUGGING_FACE, build_teacher, checkpoint_shape, copy_weights
from megapd.tasks import build_task
from megapd.trajectory import Checkpoint

SAMPLES = 64  # a forward pass


class TaskProbe:
    """Mean cross entropy [nats a label] of the first `samples` held-out samples of the configuration's task, in fp32."""

    def __init__(self, config: Config, samples: int) -> None:
        """Raises UserError where the task has fewer samples."""
        self._task = build_task(config)
        if not 1 <= samples <= self._task.heldout_samples:
            raise UserError(f"probe: {samples} samples asked for, the task holds out {self._task.heldout_samples}; ask for fewer")
        self._samples = samples

    @torch.no_grad()
    def __call__(self, trajectory: Any, checkpoint: Checkpoint) -> float:
        """Raises UserError for a checkpoint of another vocabulary, or of transformers, whose ids the task cannot vouch for."""
        if HUGGING_FACE in checkpoint.config:
            raise UserError(f"{checkpoint.path}: the probe is for megapd's own checkpoints; import it without")
        if not checkpoint.speaks(self._task.vocabulary_digest):
            raise UserError(
                f"{checkpoint.path}: trained on another vocabulary than the task has; name the task that it was trained on"
            )
        model = build_teacher(checkpoint, None)
        copy_weights(model, trajectory.load(checkpoint.step), checkpoint.path)  # type: ignore[arg-type]
        model.eval()
        classes = checkpoint_shape(checkpoint).classes
        total, count = 0.0, 0
        for start in range(0, self._samples, SAMPLES):
            batch = self._task.heldout(range(start, min(start + SAMPLES, self._samples)))
            logits: Tensor = model(batch, mode="logits")
            total += cross_entropy(logits[:, :classes].float(), batch.labels, reduction="sum").item()
            count += batch.labels.numel()
        return total / count
