"""`megapd plan`: which checkpoint teaches when, as a table and a picture."""

from __future__ import annotations

from pathlib import Path

from megapd.analysis.plots import plot_plan
from megapd.analysis.timeline import describe_plan
from megapd.config import Config
from megapd.errors import UserError
from megapd.schedule.resolve import resolve_plan
from megapd.teacher.locate import open_trajectory


def show_plan(config: Config, output: Path | None) -> int:
    """output: of the picture; None: plots/plan.png in the run's folder, unless the teacher has yet to write it."""
    if config.teacher is None or config.schedule is None:
        raise UserError("teacher: this configuration has no teacher, so there is no schedule to plan")
    plan = resolve_plan(config, open_trajectory(config))
    print(describe_plan(plan))
    if output is not None or config.schedule.waits is None:
        picture = output or config.folder / "plots" / "plan.png"
        plot_plan(plan, picture)
        print(picture)
    return 0
