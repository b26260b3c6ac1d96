"""What a configuration can name: read without torch."""

from __future__ import annotations

from typing import Literal

from megapd.config import ScheduleConfig, TaskConfig
from megapd.registry import policies, tasks


@tasks.register("bitcount")
class BitCountConfig(TaskConfig):
    """How many of the bits are set, modulo `classes`."""

    builder = "bitcount.parts:BitCount"

    kind: Literal["bitcount"] = "bitcount"
    length: int = 8
    classes: int = 3


@policies.register("halves")
class HalvesConfig(ScheduleConfig):
    """The first checkpoint for the first half of the run, the last for the second."""

    builder = "bitcount.parts:halves"

    policy: Literal["halves"] = "halves"
