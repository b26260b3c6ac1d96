"""Section `schedule`."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from megapd.config.base import OpenSection, Section
from megapd.registry import Registry, policies


class ScheduleConfig(OpenSection):
    """Which of the teacher's checkpoints teaches when.

    `builder(section, there, steps)` resolves it over the teacher steps `there`, increasing, for a run of `steps` student steps:
    pieces [(student step, teacher step), ..], the first at 0, increasing, all below `steps`; and warnings, one line each. It is
    pure, and raises UserError naming the setting. What else megapd has to know, a policy says itself:

    needs_metrics   it is built from the checkpoints' metrics too: builder(section, there, steps, {teacher step: metrics})
    """

    registry: ClassVar[Registry[type[Any]]] = policies
    tag: ClassVar[str] = "policy"
    needs_metrics: ClassVar[bool] = False

    policy: str

    @property
    def waits(self) -> float | None:
        """Seconds to wait for a checkpoint that the teacher has yet to write; None: all must be there when the run starts."""
        return None

    @property
    def grows(self) -> AdaptiveConfig | None:
        """How decisions extend it as the student learns; None: it is resolved when the run starts."""
        return None


@policies.register("one_shot")
class OneShotConfig(ScheduleConfig):
    """One checkpoint for the whole run; by default the last of the trajectory."""

    builder = "megapd.schedule.policies:one_shot"

    policy: Literal["one_shot"] = "one_shot"
    checkpoint: int | None = Field(None, ge=0, description="step of the teacher's checkpoint")


@policies.register("equal")
class EqualConfig(ScheduleConfig):
    """(N, T)-progressive: N equally spaced checkpoints, T student steps each, then the last one."""

    builder = "megapd.schedule.policies:equal"

    policy: Literal["equal"] = "equal"
    checkpoints: int = Field(ge=1, description="N")
    steps: int = Field(ge=1, description="T, student steps a checkpoint")


@policies.register("matched")
class MatchedConfig(ScheduleConfig):
    """Student step s in [iR, (i+1)R) is taught by the teacher's step (i+1) * R * speed, capped at the last."""

    builder = "megapd.schedule.policies:matched"

    policy: Literal["matched"] = "matched"
    refresh: int = Field(ge=1, description="R, student steps between rotations")
    speed: float = Field(1.0, gt=0.0)


class RangeConfig(Section):
    """From student step `start` on, the checkpoint of the teacher's step `checkpoint` teaches."""

    start: int = Field(ge=0)
    checkpoint: int = Field(ge=0)


@policies.register("explicit")
class ExplicitConfig(ScheduleConfig):
    """A list of ranges; the first starts at 0, each lasts until the next starts."""

    builder = "megapd.schedule.policies:explicit"

    policy: Literal["explicit"] = "explicit"
    ranges: tuple[RangeConfig, ...] = Field(min_length=1)

    @field_validator("ranges")
    @classmethod
    def _ordered(cls, ranges: tuple[RangeConfig, ...]) -> tuple[RangeConfig, ...]:
        starts = [r.start for r in ranges]
        if starts[0] != 0:
            raise ValueError(f"the first range must start at 0, not {starts[0]}")
        if any(b <= a for a, b in itertools.pairwise(starts)):
            raise ValueError(f"the starts must increase, got {starts}")
        return ranges


@policies.register("follow")
class FollowConfig(ScheduleConfig):
    """Teacher and student train together: R steps a checkpoint as in `matched`, waiting for each to be written."""

    builder = "megapd.schedule.policies:follow"

    policy: Literal["follow"] = "follow"
    refresh: int = Field(ge=1)
    speed: float = Field(1.0, gt=0.0)
    last: int = Field(ge=1, description="the last step of the teacher run, whose checkpoint ends the trajectory")
    timeout_seconds: float = Field(3600.0, gt=0.0, description="longest wait for one checkpoint")

    @property
    def waits(self) -> float:
        return self.timeout_seconds


@policies.register("geometric")
class GeometricConfig(ScheduleConfig):
    """N checkpoints at geometrically growing teacher steps, from `first` to the last one, each for an equal part of the run."""

    builder = "megapd.schedule.policies:geometric"

    policy: Literal["geometric"] = "geometric"
    checkpoints: int = Field(ge=1, description="N")
    first: int | None = Field(None, ge=1, description="the first one's step; default: the trajectory's first after step 0")
    steps: int | None = Field(None, ge=1, description="T, student steps a checkpoint")
    total: int | None = Field(None, ge=1, description="student steps that the N checkpoints share equally, instead of `steps`")

    @model_validator(mode="after")
    def _one_length(self) -> GeometricConfig:
        if (self.steps is None) == (self.total is None):
            raise ValueError("steps: give either steps, of each checkpoint, or total, of all together")
        if self.total is not None and self.total < self.checkpoints:
            raise ValueError(f"total: {self.total} student steps are too few for {self.checkpoints} checkpoints; raise it")
        return self


@policies.register("transition")
class TransitionConfig(ScheduleConfig):
    """(N, T)-progressive around the teacher's phase transition: N - 1 checkpoints from inside it, T student steps each, then the
    last one."""

    builder = "megapd.schedule.policies:transition"
    needs_metrics = True

    policy: Literal["transition"] = "transition"
    steps: int = Field(ge=1, description="T, student steps a checkpoint")
    checkpoints: int = Field(2, ge=2, description="N, the last checkpoint included")
    metric: Literal["auto", "loss", "degree_1", "m_robust_3"] = Field(
        "auto", description="what shows the transition; auto: a curriculum metric where one is recorded, else the loss"
    )


@policies.register("adaptive")
class AdaptiveConfig(ScheduleConfig):
    """Go on to the next of N checkpoints when the student's accuracy or divergence no longer improves."""

    builder = "megapd.schedule.policies:adaptive"

    policy: Literal["adaptive"] = "adaptive"
    checkpoints: int | None = Field(None, ge=1, description="N, chosen by `spacing`")
    spacing: Literal["equal", "geometric"] = "equal"
    teachers: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="the checkpoints' steps, instead of `checkpoints`")
    metric: Literal["accuracy", "divergence"] = Field("accuracy", description="held out; or of the training steps reported")
    window: int = Field(5, ge=1, description="reports whose mean the next one is compared with")
    gain: float = Field(0.01, ge=0.0, description="a report that improves on that mean by less is saturated")
    patience: int = Field(1, ge=1, description="saturated reports in a row that advance")
    progress: float = Field(0.01, ge=0.0, description="improvement since the last advance that the next one needs; 0: none")
    min_dwell: int = Field(1, ge=1, description="student steps that each checkpoint teaches at least")
    max_dwell: int | None = Field(None, ge=1, description="student steps after which the next one follows in any case")
    lead: int = Field(10, ge=1, description="student steps between a decision and its effect")

    @model_validator(mode="after")
    def _consistent(self) -> AdaptiveConfig:
        if (self.checkpoints is None) == (not self.teachers):
            raise ValueError("checkpoints: give either checkpoints, a number, or teachers, a list of steps")
        if any(b <= a for a, b in itertools.pairwise(self.teachers)):
            raise ValueError(f"teachers: the steps must increase, got {list(self.teachers)}")
        if self.max_dwell is not None and self.max_dwell < self.min_dwell:
            raise ValueError(f"max_dwell: {self.max_dwell} is below min_dwell {self.min_dwell}; raise it")
        return self

    @property
    def grows(self) -> AdaptiveConfig:
        return self
