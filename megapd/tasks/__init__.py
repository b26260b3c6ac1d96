"""Tasks: (configuration, step) -> Batch."""

from __future__ import annotations

from megapd import config as settings
from megapd.tasks.base import Task
from megapd.tasks.parity import HierarchicalParityTask, ParityTask
from megapd.tasks.text import TextTask

__all__ = ["HierarchicalParityTask", "ParityTask", "Task", "TextTask", "build_task"]


def build_task(config: settings.Config) -> Task:
    """The task of a run. Raises UserError where text has no fitting corpus."""
    seed, global_batch = config.seed, config.training.global_batch
    match config.task:
        case settings.ParityConfig() as parity:
            return ParityTask(parity, seed, global_batch)
        case settings.HierarchicalParityConfig() as hierarchical:
            return HierarchicalParityTask(hierarchical, seed, global_batch)
        case settings.TextConfig() as text:
            return TextTask(text, text.corpus or config.corpus.output, seed, global_batch)
