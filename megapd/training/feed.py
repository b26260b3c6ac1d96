"""The rank's share of each step's batch, built ahead of the step that needs it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megapd.batch import Batch
from megapd.tasks import Task

Built = Callable[[int, list[Batch]], None]


class BatchFeed:
    """Micro-batches by step number. A batch is a pure function of the step, so a resume needs the number and replays nothing."""

    def __init__(self, task: Task, rows: list[range], steps: range, depth: int, device: torch.device, built: Built) -> None:
        """rows: those of each micro-batch within the global batch; steps: the steps to come; depth: steps built ahead.

        built: told of every step's batches as soon as they are built, on the host, in order, off the loop's thread.
        """
        self._task, self._rows, self._steps, self._depth, self._device, self._built = task, rows, steps, depth, device, built
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[int, Future[list[Batch]]] = {}

    def get(self, step: int) -> list[Batch]:
        """The micro-batches of `step`, on the device."""
        for upcoming in range(step, min(step + self._depth + 1, self._steps.stop)):
            if upcoming not in self._ahead:
                self._ahead[upcoming] = self._thread.submit(self._build, upcoming)
        return [batch.to(self._device) for batch in self._ahead.pop(step).result()]

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _build(self, step: int) -> list[Batch]:
        batches = [self._task.batch(step, rows) for rows in self._rows]
        self._built(step, batches)
        return batches
