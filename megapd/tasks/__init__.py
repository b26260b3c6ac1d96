"""Tasks: (configuration, step) -> Batch."""

from __future__ import annotations

from megapd.config import Config
from megapd.tasks.base import Task

__all__ = ["Task", "build_task"]


def build_task(config: Config) -> Task:
    """The task of a run. Raises UserError where text has no fitting corpus."""
    task: Task = config.task.build(config.seed, config.training.global_batch, config.corpus.output)
    return task
