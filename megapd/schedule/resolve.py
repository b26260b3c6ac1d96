"""A configured schedule over a trajectory; the one file here that knows trajectories."""

from __future__ import annotations

from dataclasses import replace

from megapd.config import Config, ScheduleConfig
from megapd.schedule.plan import Plan
from megapd.schedule.policies import build_plan
from megapd.trajectory import Checkpoints
from megapd.trajectory.hugging_face import HuggingFaceTrajectory


def resolve_plan(config: Config, trajectory: Checkpoints, schedule: ScheduleConfig | None = None) -> Plan:
    """The schedule, by default that of the run, over the checkpoints there are; `follow` does not need them yet."""
    schedule = schedule or config.schedule
    assert schedule is not None
    # Models of transformers come without metrics, and to describe one is to fetch and hash it.
    metrics_of = None if isinstance(trajectory, HuggingFaceTrajectory) else lambda step: trajectory.checkpoint(step).metrics
    plan = build_plan(schedule, available=trajectory.steps, steps=config.training.steps, metrics_of=metrics_of)
    return replace(plan, warnings=(*trajectory.notes(plan.teachers), *plan.warnings))
