"""What `megapd trajectory` shows: the checkpoints of a trajectory, and where its phase transition lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator
from pydantic import ValidationError
from rich.box import SIMPLE_HEAD
from rich.table import Table

from megapd.analysis.plots import PALETTE, TEXT, label_axes, new_figure, save
from megapd.analysis.timeline import plain
from megapd.config import TransitionConfig, load
from megapd.errors import UserError
from megapd.schedule.transition import Found, all_metrics, find_transition
from megapd.trajectory import Checkpoints, Trajectory
from megapd.trajectory.hugging_face import HuggingFaceTrajectory, is_hugging_face
from megapd.trajectory.opening import open_checkpoints

AROUND = 8  # checkpoints shown on either side of the drop
LISTED = ("eval/loss", "eval/accuracy", "train/loss")
TICKS = 7  # labels of the axis of steps


def open_source(source: str, steps: tuple[int, ...] = ()) -> Trajectory | HuggingFaceTrajectory:
    """`open_checkpoints`, with what may be named where there is nothing."""
    if not is_hugging_face(source) and not Path(source).is_dir():
        raise UserError(f"{source}: no such folder; name a trajectory's, runs/NAME/trajectory, or the run's")
    return open_checkpoints(source, steps)


def suggest(
    source: Path, overrides: list[str], checkpoints: int | None, metric: str | None, probe_samples: int = 0
) -> tuple[Found, Path]:
    """What schedule.policy transition would choose, and where its plot goes unless told otherwise.

    source: the folder of a trajectory or of its run, or the YAML file of a student, whose schedule it is then if it is a
    transition. checkpoints, metric: settings of the schedule, instead of its own. probe_samples: held-out samples on which each
    checkpoint's loss is measured, which published ones need, for they carry no metrics; 0: none. Raises UserError as
    find_transition does.
    """
    settings: dict[str, Any] = {"steps": 1}  # T changes nothing in the choice
    probed: dict[int, dict[str, float]] = {}
    if probe_samples and source.is_dir():
        raise UserError(f"--probe: it needs held-out samples; give the YAML file of a student instead of {source}")
    if source.is_dir():
        if overrides:
            raise UserError(f"{overrides[0]!r}: settings go with a configuration, and {source} is a folder")
        trajectory = open_source(str(source))
        assert isinstance(trajectory, Trajectory)
        folder = trajectory.folder.parent if trajectory.folder.name == "trajectory" else trajectory.folder
        opened: Checkpoints = trajectory
    else:
        from megapd.evaluation.probe import TaskProbe  # these two need torch, and a folder does not
        from megapd.teacher.locate import open_trajectory

        config = load(source, overrides)
        if config.teacher is None:
            raise UserError(f"{source}: teacher: this configuration has none; name a student's, or the folder of a trajectory")
        opened = open_trajectory(config)
        if probe_samples:
            probe = TaskProbe(config, probe_samples)
            probed = {step: {"eval/loss": probe(opened, opened.checkpoint(step))} for step in opened.steps if step > 0}
        elif isinstance(opened, HuggingFaceTrajectory):
            fix = "give --probe SAMPLES, or name checkpoints with schedule.policy explicit"
            raise UserError(f"teacher.trajectory: checkpoints of transformers carry no metrics to find a transition in; {fix}")
        if isinstance(config.schedule, TransitionConfig):
            settings = config.schedule.model_dump()
        folder = config.folder
    settings |= {key: value for key, value in (("checkpoints", checkpoints), ("metric", metric)) if value is not None}
    try:
        schedule = TransitionConfig(**settings)
    except ValidationError as error:
        raise UserError(f"--{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from error
    metrics = all_metrics(opened.steps, lambda step: probed.get(step) or opened.checkpoint(step).metrics)
    if not metrics:
        raise UserError(f"{source}: the trajectory holds no checkpoint after step 0; train the teacher further")
    return find_transition(schedule, metrics), folder / "plots" / "transition.png"


def describe_trajectory(trajectory: Trajectory | HuggingFaceTrajectory) -> str:
    """A line a checkpoint: step, digest, bytes, metrics; then the folders that are no complete checkpoint.

    Of the hub's, which would have to be fetched for their digests, step and name alone.
    """
    if isinstance(trajectory, HuggingFaceTrajectory) and trajectory.remote:
        lines = [f"{step:>12,}  {trajectory.located(step)}" for step in trajectory.steps]
        return "\n".join([f"{trajectory.spec}: {len(lines)} checkpoints", *lines])
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("step", "digest", "bytes", *LISTED):
        table.add_column(column, justify="right")
    for step in trajectory.steps:
        checkpoint = trajectory.checkpoint(step)
        size = sum(file.bytes for file in checkpoint.files.values())
        values = (checkpoint.metrics.get(key) for key in LISTED)
        numbers = [f"{value:.4g}" if isinstance(value, (int, float)) else "-" for value in values]
        table.add_row(f"{step:,}", checkpoint.digest[:12], f"{size:,}", *numbers)
    incomplete = [f"step {step:,}: no meta.json, so it is no complete checkpoint" for step in trajectory.incomplete]
    name = trajectory.spec if isinstance(trajectory, HuggingFaceTrajectory) else trajectory.folder
    return "\n".join([f"{name}: {len(trajectory.steps)} checkpoints", plain(table), *incomplete])


def describe_found(found: Found) -> str:
    """The checkpoints around the transition with metric and slope, the choice and its reasons, and the setting to paste."""
    curve = found.curve
    slopes = ["", *(f"{slope:.4g}" for slope in curve.slopes())]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("teacher's step", curve.key, "fall per ln(step)"):
        table.add_column(column, justify="right")
    table.add_column("", justify="left")
    begin = max(0, curve.steps.index(found.first) - AROUND)
    end = min(len(curve.steps), curve.steps.index(found.last) + 1 + AROUND)
    if begin > 0:
        table.add_row("...", "...", "...", f"{begin} more")
    for step, value, slope in list(zip(curve.steps, curve.values, slopes, strict=True))[begin:end]:
        mark = "<- chosen" if step in found.picks else "transition" if found.first <= step <= found.last else ""
        table.add_row(f"{step:,}", f"{value:.4g}", slope, mark)
    if end < len(curve.steps):
        table.add_row("...", "...", "...", f"{len(curve.steps) - end} more")
    teachers = ", ".join(f"{step:,}" for step in (*found.picks, found.final))
    setting = f"schedule: {{policy: transition, steps: T, checkpoints: {len(found.picks) + 1}}}"
    chosen = f"({len(found.picks) + 1}, T) with the checkpoints {teachers}:  {setting}"
    return "\n".join([plain(table), "", f"{found.why}.", *(f"warning: {warning}" for warning in found.warnings), chosen])


def plot_found(found: Found, output: Path) -> Path:
    """The metric over the teacher's steps and its slope, the transition shaded, the choice marked; returns the PNG's path."""
    curve = found.curve
    figure, (values, slopes) = new_figure(2)
    steps = np.asarray(curve.steps, dtype=np.float64)
    values.plot(steps, curve.values, color=PALETTE[0], linewidth=1.6, marker="o", markersize=3.5)
    slopes.stairs(curve.slopes(), steps, baseline=None, color=PALETTE[0], linewidth=1.6)
    for axes in (values, slopes):
        axes.axvspan(found.first, found.last, color=PALETTE[5], alpha=0.15, linewidth=0)
        for step in found.picks:
            axes.axvline(step, color=PALETTE[1], linewidth=1.3)
    for step in found.picks:
        values.plot([step], [found.value(step)], color=PALETTE[1], marker="D", markersize=7)
        values.annotate(f"{step:,}", (step, found.value(step)), (7, 5), textcoords="offset points", fontsize=9, color=TEXT)
    label_axes(values, curve.key, "teacher's steps")
    label_axes(slopes, f"fall of {curve.key} per ln(step)", "teacher's steps")
    values.set_xscale("log")  # of both, which share the axis
    spread = np.unique(np.linspace(0, steps.size - 1, TICKS).round().astype(int)) if steps.size > TICKS else range(steps.size)
    ticks = _apart([curve.steps[place] for place in spread] + list(found.picks))
    for axes in (values, slopes):
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    chosen = ", ".join(f"{step:,}" for step in found.picks)
    values.set_title(f"transition {found.first:,} to {found.last:,}, chosen {chosen}", loc="left", fontsize=10, color=TEXT)
    return save(figure, output)


def _apart(steps: list[int]) -> list[int]:
    """Of the steps those whose labels do not overlap on a logarithmic axis; a later one in the list displaces an earlier."""
    width = np.log(max(steps) / min(steps)) / 9 if max(steps) > min(steps) else 0.0
    kept: list[int] = []
    for step in reversed(steps):
        if all(abs(np.log(step / other)) >= width for other in kept):
            kept.append(step)
    return sorted(kept)
