"""`megapd analyse`: curriculum metrics of a teacher's checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megapd.analysis.curriculum import analyse, metrics_of
from megapd.analysis.curriculum.report import describe, in_l1, write_report
from megapd.config import load
from megapd.errors import UserError
from megapd.files import check_run
from megapd.tasks import build_task
from megapd.training.folder import METRICS, named_run, read_record
from megapd.trajectory.opening import open_checkpoints
from megapd.trajectory.reader import Trajectory


def analyse_checkpoints(
    overrides: Sequence[str],
    source: str,
    steps: tuple[int, ...],
    names: Sequence[str],
    samples: int | None,
    output: Path | None,
    *,
    l1: bool = False,
) -> int:
    """Measure, print a table, write a picture and a CSV; the numbers are kept with the checkpoints.

    source: a run's folder or that of its trajectory, whose config.yaml names the task, or a published model with the task among
    the overrides.
    """
    trajectory = open_checkpoints(source, steps)
    run = None
    if isinstance(trajectory, Trajectory) and (trajectory.folder.parent / "config.yaml").is_file():
        run = trajectory.folder.parent
        record = read_record(run)
        if record is not None:
            check_run(run / METRICS, named_run(run / METRICS), record.id)
    elif not any(setting.startswith(("--task.", "--task=")) for setting in overrides):
        raise UserError(f"{source}: there is no run's config.yaml that names its task; give the task as --task.kind=...")
    task = build_task(load(None if run is None else run / "config.yaml", list(overrides)))
    asked = metrics_of(task, names, samples)
    for name, metric in asked.items():
        print(f"{name}: {', '.join(f'{key} {value}' for key, value in metric.settings.items() if key != 'version')}", end="")
        print(f"; {metric.convention}" if metric.convention else "")
    with tqdm(total=len(trajectory.steps) * len(asked), unit=" measured", file=sys.stderr, dynamic_ncols=True) as bar:

        def told(step: int, name: str) -> None:
            bar.set_description(f"step {step} {name}")
            bar.update()

        found = analyse(trajectory, task, asked, told)
    if l1:
        found = in_l1(found)
    print(describe(found))
    for written in write_report(found, output or (run or Path.cwd()) / "plots" / "curriculum.png"):
        print(written)
    return 0
