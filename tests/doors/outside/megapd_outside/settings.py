"""The sections, which are read without torch; what they describe is in learning.py."""

from typing import Literal

from pydantic import Field

from megapd.config import ModelConfig, ScheduleConfig, TaskConfig
from megapd.registry import models, policies, tasks


@tasks.register("majority")
class MajorityConfig(TaskConfig):
    """Whether most of the first `voters` bits are 1."""

    builder = "megapd_outside.learning:Majority"

    kind: Literal["majority"] = "majority"
    length: int = Field(12, ge=1)
    voters: int = Field(3, ge=1)


@models.register("signs")
class SignsConfig(ModelConfig):
    """The bits as +-1, straight to the head."""

    builder = "megapd_outside.learning:build_signs"

    kind: Literal["signs"] = "signs"
    length: int = 12

    @property
    def head_width(self) -> int:
        return self.length

    @property
    def causal(self) -> None:
        return None

    def flops_per_token(self, *, classes: int, length: int, labelled_share: float) -> float:
        return labelled_share * 4.0 * length * classes

    def activations(self, length: int) -> int:
        return length


@policies.register("alternate")
class AlternateConfig(ScheduleConfig):
    """The first and the last checkpoint in turn, `every` steps each."""

    builder = "megapd_outside.policy:alternate"

    policy: Literal["alternate"] = "alternate"
    every: int = Field(ge=1)
