"""What a configuration can name: read without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megapd.config import ModelConfig, ScheduleConfig, TaskConfig
from megapd.registry import models, policies, tasks


@tasks.register("bitcount")
class BitCountConfig(TaskConfig):
    """How many of the bits are set, modulo `classes`."""

    builder = "bitcount.parts:BitCount"

    kind: Literal["bitcount"] = "bitcount"
    length: int = Field(8, ge=1)
    classes: int = 3


@models.register("signs")
class SignsConfig(ModelConfig):
    """The bits as +-1, each scaled, straight to the head; width: how many there are."""

    builder = "bitcount.parts:signs"

    kind: Literal["signs"] = "signs"
    width: int = 8

    @property
    def head_width(self) -> int:
        return self.width

    @property
    def causal(self) -> None:
        return None

    def flops_per_token(self, *, classes: int, length: int, labelled_share: float) -> float:
        return labelled_share * 6.0 * length * classes

    def activations(self, length: int) -> int:
        return length


@policies.register("halves")
class HalvesConfig(ScheduleConfig):
    """The first checkpoint for the first half of the run, the last for the second."""

    builder = "bitcount.parts:halves"

    policy: Literal["halves"] = "halves"
