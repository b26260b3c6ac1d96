"""Metric: something measured of a model, one checkpoint after the other. Other packages register theirs, see megapd.registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from megapd.tasks import Task

Model = Callable[..., Tensor]  # (batch, mode="logits") -> [N, V]; mode "hidden" -> [N, D]; N labelled positions


class Metric(ABC):
    """Made once for a task.

    samples     held-out samples that it is measured on, where nobody asks for another number
    settings    all that the numbers depend on beside the weights and the task; numbers under other settings are measured again
    convention  which of several definitions the numbers follow, for whoever reads them
    """

    samples: ClassVar[int] = 256
    settings: dict[str, Any]
    convention: str = ""

    @classmethod
    def lacks(cls, task: Task) -> str:
        """What the task does not have that is needed; "": nothing."""
        return ""

    @abstractmethod
    def __init__(self, task: Task, samples: int) -> None:
        """samples: held-out samples to measure on, of which the task has so many."""

    @abstractmethod
    def measure(self, model: Model) -> dict[str, float]:
        """Numbers by name, finite. Without gradients; in the model's own type."""
