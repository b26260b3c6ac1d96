"""Curves of runs and the staircase of a plan, as PNG; the numbers of the curves as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from megapd.errors import UserError
from megapd.files import write_atomic
from megapd.schedule.plan import Plan

METRICS = "metrics.jsonl"
Record = dict[str, Any]

# Okabe and Ito's palette, told apart in the three common kinds of colour blindness; its yellow, too light on white, is left out.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # they change when the colours have run out: 49 runs are told apart
SIZE, DPI = (10.0, 3.93), 140  # inches and dots an inch: 1400 x 550 pixels
ROW_HEIGHT = 2.7  # inches of a row of panels
PANELS = (  # kind of line, number in it, what the axis says
    ("train", "loss", "training loss"),
    ("eval", "loss", "held-out loss"),
    ("eval", "accuracy", "held-out accuracy"),
    ("train", "divergence", "divergence from the teacher"),
)
GRID, AXIS, TEXT = "#e8e8e8", "#b0b0b0", "#404040"
NOISY = 150  # points of a training curve; of more, the running mean is drawn over the faint raw curve
CROWDED = 40  # points of a held-out curve; of more, their markers are left out


def read_metrics(folder: Path) -> list[Record]:
    """The lines of folder/metrics.jsonl, in order, each with `kind` and `step`; numbers that are not finite are None.

    A half-written last line (without its newline) is left out. Raises UserError, with the line number, for any other bad line.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        raise UserError(f"{path}: no such file; {folder} is not the folder of a run that has begun")
    *lines, partial = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_record(line))
        except ValueError as error:
            raise UserError(f"{path}: line {number} is no metrics line: {error}; repair or remove it") from error
    if partial:
        with suppress(ValueError):  # being written just now, or cut off by a kill: the whole lines stand without it
            records.append(_record(partial))
    return records


def steps_to_accuracy(metrics: Sequence[Record], threshold: float) -> int | None:
    """Steps done at the first evaluation whose held-out accuracy is at least `threshold`; None if none is."""
    reached = (r["step"] for r in metrics if r["kind"] == "eval" and r.get("accuracy") is not None and r["accuracy"] >= threshold)
    return next(reached, None)


def plot_runs(run_folders: Sequence[Path], output: Path) -> list[Path]:
    """Curves of several runs against steps done: training loss, held-out loss, held-out accuracy, the divergence from the teacher
    where there is one; below them, a strip a run that says which of the teacher's steps teaches when.

    Writes `output` (a PNG; the suffix is added if it lacks) and the CSV of the same name with columns run, kind, step, metric,
    value: every number in the runs' metrics, with an empty value where one was not finite. Returns both paths. Raises UserError
    for a folder without metrics.
    """
    runs = {name: current(read_metrics(folder)) for name, folder in _names(run_folders).items()}
    for name, records in runs.items():
        if all(record["kind"] == "run" for record in records):
            raise UserError(f"{name}: its {METRICS} is empty; let the run write a line first (telemetry.every)")
    picture = save(runs_figure(runs), output)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("run", "kind", "step", "metric", "value"))
    for name, records in runs.items():
        writer.writerows((name, *row) for row in tidy(records))
    numbers = picture.with_suffix(".csv")
    write_atomic(numbers, table.getvalue())
    return [picture, numbers]


def runs_figure(runs: dict[str, list[Record]]) -> Figure:
    """The picture of `plot_runs`, of each run's lines. Its axes are labelled with what they show."""
    shown = [panel for panel in PANELS if any(series(records, panel[0], panel[1])[0].size for records in runs.values())]
    taught = [name for name, records in runs.items() if any(record["kind"] == "rotation" for record in records)]
    rows = -(-len(shown) // 2)
    strip = 0.2 * len(taught) + 0.5 if taught else 0.0  # inches
    figure = Figure(figsize=(SIZE[0], rows * ROW_HEIGHT + strip + 0.4), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows + bool(taught), 2, height_ratios=[ROW_HEIGHT] * rows + [strip] * bool(taught))
    first: Axes | None = None
    for number, (kind, metric, label) in enumerate(shown):
        wide = number == len(shown) - 1 and number % 2 == 0
        place = grid[number // 2, :] if wide else grid[number // 2, number % 2]
        axes = first = figure.add_subplot(place, sharex=first)
        for run, records in enumerate(runs.values()):
            colour, marker = _style(run)
            if kind == "train":
                _training_curve(axes, *series(records, kind, metric), colour)
            else:
                _held_out_curve(axes, *series(records, kind, metric), colour, marker, "-")
        noisy = kind == "train" and any(series(records, kind, metric)[0].size > NOISY for records in runs.values())
        label_axes(axes, label + (" (running mean)" if noisy else ""))
        if kind == "train":
            _log_if_positive(axes, [series(records, kind, metric)[1] for records in runs.values()])
    if taught:
        _strips(figure.add_subplot(grid[rows, :], sharex=first), {name: runs[name] for name in taught})
    handles = []
    for run, name in enumerate(runs):
        colour, marker = _style(run)
        handles.append(Line2D([], [], color=colour, linewidth=1.8, marker=marker, markersize=4, label=name))
    columns = max(1, min(len(runs), 120 // (6 + max(map(len, runs)))))  # about 120 characters fit beside each other
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, labelcolor=TEXT)
    return figure


def _style(run: int) -> tuple[str, str]:
    """Colour and marker of a run by its number."""
    return PALETTE[run % len(PALETTE)], MARKERS[run // len(PALETTE) % len(MARKERS)]


def _strips(axes: Axes, runs: dict[str, list[Record]]) -> None:
    """A row a run, of the teacher's steps that taught it: the darker, the later; named where there is room."""
    spans = {name: list(taught_spans(records)) for name, records in runs.items()}
    latest = max(teacher for row in spans.values() for _, _, teacher in row) or 1
    width = max(end for row in spans.values() for _, end, _ in row) or 1
    for row, found in enumerate(spans.values()):
        for start, end, teacher in found:
            shade = 0.12 + 0.68 * teacher / latest
            axes.barh(row, end - start, left=start, height=0.8, color=str(1.0 - shade), edgecolor="white", linewidth=0.6)
            label = EngFormatter(sep="")(teacher)
            if (end - start) / width > 0.014 * len(label):
                ink = "white" if shade > 0.4 else TEXT
                axes.text((start + end) / 2, row, label, ha="center", va="center", fontsize=8, color=ink, clip_on=True)
    label_axes(axes, "")
    axes.set_xlabel("steps; in the bars, the step of the teacher that teaches", fontsize=9, color=TEXT)
    axes.set_yticks(range(len(spans)), list(spans))
    axes.set_ylim(len(spans) - 0.5, -0.5)
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def taught_spans(records: Sequence[Record]) -> Iterator[tuple[int, int, int]]:
    """(first step, end, teacher's step) of each stretch that one checkpoint taught, up to the last step on record."""
    last = max(record["step"] for record in records)
    rotations = [(record["step"], record["teacher_step"]) for record in records if record["kind"] == "rotation"]
    kept = [rotation for place, rotation in enumerate(rotations) if place == 0 or rotation[1] != rotations[place - 1][1]]
    for (start, teacher), end in zip(kept, [*(step for step, _ in kept[1:]), max(last, kept[-1][0])], strict=True):
        yield start, end, teacher


def plot_plan(plan: Plan, output: Path) -> Path:
    """The plan as a staircase: student steps to the right, the teaching checkpoint's step upwards. Returns the PNG's path."""
    figure, (axes,) = new_figure(1)
    edges = [*plan.starts, plan.steps]
    axes.stairs(plan.teachers, edges, baseline=None, color=PALETTE[0], linewidth=2.0)
    if len(plan.starts) <= CROWDED:
        axes.plot(plan.starts, plan.teachers, linestyle="", marker="o", markersize=4, color=PALETTE[0])
    axes.set_xlim(0, plan.steps)
    axes.set_ylim(0, max(plan.teachers) * 1.06 or 1.0)
    axes.set_title(f"{plan.policy}: the checkpoint that teaches each student step", loc="left", fontsize=10, color=TEXT)
    label_axes(axes, "teacher's step", "student's step")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    return save(figure, output)


def current(records: Sequence[Record]) -> list[Record]:
    """The lines that count of a run that was killed and resumed from an earlier step: a later line takes the place of the earlier
    ones of its kind at its step and after it, and a training line also that of evaluations after its step."""
    kept: list[Record] = []
    newest: dict[str, int] = {}
    for record in records:
        kind, step = record["kind"], record["step"]
        if step <= newest.get(kind, -1) or (kind == "train" and step < newest.get("eval", -1)):
            kept = [r for r in kept if not (r["kind"] == kind and r["step"] >= step)]
            if kind == "train":
                kept = [r for r in kept if not (r["kind"] == "eval" and r["step"] > step)]
            newest = {k: max((r["step"] for r in kept if r["kind"] == k), default=-1) for k in newest}
        kept.append(record)
        newest[kind] = step
    return kept


def series(records: Sequence[Record], kind: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps [n] int64, values [n] float64) of a metric; NaN, a gap in a curve, where its value was not finite."""
    found = [
        (r["step"], math.nan if r[metric] is None else float(r[metric])) for r in records if r["kind"] == kind and metric in r
    ]
    return np.array([s for s, _ in found], dtype=np.int64), np.array([v for _, v in found], dtype=np.float64)


def tidy(records: Sequence[Record]) -> Iterator[tuple[str, int, str, float | int | None]]:
    """(kind, step, metric, value) of every number, None where it was not finite; texts such as digests are left out."""
    for record in records:
        for metric, value in record.items():
            if metric not in ("kind", "step") and not isinstance(value, (str, bool, dict, list)):
                yield record["kind"], record["step"], metric, value


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` (odd) values around each, fewer at the ends; NaN values do not count, all-NaN windows stay NaN."""
    assert window % 2 == 1
    valid = np.isfinite(values)
    kernel = np.ones(window)
    total = np.convolve(np.where(valid, values, 0.0), kernel)[window // 2 :][: values.size]
    count = np.convolve(valid.astype(np.float64), kernel)[window // 2 :][: values.size]
    mean = np.full(values.size, math.nan)
    np.divide(total, count, out=mean, where=count > 0.5)
    return mean


def _record(line: bytes) -> Record:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str) or type(record.get("step")) is not int:
        raise ValueError("it lacks kind or step")
    return {key: None if _not_finite(value) else value for key, value in record.items()}


def _not_finite(value: Any) -> bool:
    if isinstance(value, str):
        return value.lower().lstrip("+-") in ("nan", "inf", "infinity")
    return isinstance(value, float) and not math.isfinite(value)


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """A name for each distinct folder: its own, with as many parents as tell all apart."""
    if not folders:
        raise UserError("plot: no run folder given; name at least one, runs/NAME")
    resolved = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(resolved):
        depth += 1
    return {"/".join(path.parts[-depth:]): path for path in resolved}


def new_figure(panels: int) -> tuple[Figure, list[Axes]]:
    """A figure drawn by Agg without pyplot, whose global state belongs to the caller."""
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False, sharex=True)[0])


def _training_curve(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    if values.size > NOISY:
        axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.22)
        values = running_mean(values, 2 * (values.size // 200) + 3)
    axes.plot(steps, values, color=colour, linewidth=1.6, marker="." if values.size == 1 else "")


def _held_out_curve(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, marker: str, style: Any) -> None:
    shown = marker if values.size <= CROWDED else ""
    axes.plot(steps, values, color=colour, linestyle=style, linewidth=1.3, marker=shown, markersize=3.5)


def label_axes(axes: Axes, y: str, x: str = "steps") -> None:
    axes.set_xlabel(x, fontsize=9, color=TEXT)
    axes.set_ylabel(y, fontsize=9, color=TEXT)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(which="both", labelsize=8, labelcolor=TEXT, color=AXIS)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(AXIS)


def _log_if_positive(axes: Axes, curves: Sequence[np.ndarray]) -> None:
    values = np.concatenate(curves)
    values = values[np.isfinite(values)]
    if values.size == 0 or values.min() <= 0:
        return
    axes.set_yscale("log")
    if values.max() / values.min() < 100:  # under two decades the powers of ten alone would leave the axis nearly bare
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if values.max() / values.min() > 5 else range(1, 10)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def save(figure: Figure, output: Path) -> Path:
    """Write it as PNG, the suffix added if it lacks; the file's path."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    path = output if output.suffix == ".png" else output.with_name(output.name + ".png")  # "tau0.5" has no suffix to replace
    write_atomic(path, picture.getvalue())
    return path
