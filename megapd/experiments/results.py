"""What the runs of a sweep came to: curves, each method at its best point of the grid, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from megapd.analysis.plots import PALETTE, current, label_axes, new_figure, read_metrics, save, series
from megapd.analysis.timeline import plain
from megapd.errors import UserError
from megapd.experiments.runner import ended
from megapd.experiments.spec import Cell, Point, Sweep, students_of, teachers_of
from megapd.experiments.statistics import arrivals, first_of, paired


@dataclass(frozen=True)
class Result:
    """Of one run: steps [n] and values [n] of the metric at its evaluations; failed: it diverged."""

    cell: Cell
    failed: bool
    steps: NDArray[np.int64] = field(repr=False)
    values: NDArray[np.float64] = field(repr=False)

    @property
    def final(self) -> float:
        """NaN of a run that diverged."""
        return math.nan if self.failed or not len(self.values) else float(self.values[-1])

    def reached(self, threshold: float, *, rising: bool) -> int | None:
        """Steps at the first evaluation at which the metric is as good as that."""
        there = self.values >= threshold if rising else self.values <= threshold
        return int(self.steps[np.argmax(there)]) if there.any() else None


@dataclass(frozen=True)
class Chosen:
    """A method at its best point: results in the order of (teacher seed, student seed); edge: a setting whose best value is the
    first or the last that was tried."""

    method: str
    point: Point
    results: tuple[Result, ...]
    edge: str


def collect(sweep: Sweep) -> dict[str, dict[Point, tuple[Result, ...]]]:
    """Method -> point -> results, all seeds. UserError where a run is missing: the sweep goes on with it."""
    found: dict[str, dict[Point, tuple[Result, ...]]] = {}
    for cell in students_of(sweep):
        points = found.setdefault(cell.method, {})
        points[cell.point] = (*points.get(cell.point, ()), _read(sweep, cell))
    return found


def teacher_curves(sweep: Sweep) -> list[Result]:
    return [_read(sweep, cell) for cell in teachers_of(sweep).values()]


def choose(sweep: Sweep) -> list[Chosen]:
    """Each method at its best point of the grid: with a threshold where most runs arrive, of those where they do so earliest by
    the mean, and then, or without, by the mean of the metric at the end. Diverged runs count as worst."""
    chosen = []
    for method, points in collect(sweep).items():
        best = max(points, key=lambda point: _merit(sweep, points[point]))
        tried = {name: values for name, values in sweep.grid.items() if len(values) > 1}
        edges = [name for name, value in best if name in tried and value in (tried[name][0], tried[name][-1])]
        chosen.append(Chosen(method, best, points[best], ", ".join(edges)))
    return chosen


def table(sweep: Sweep) -> str:
    """Methods at their best points, then each against the first by pairs of seeds. Lines below say what to look at."""
    chosen = choose(sweep)
    names = [name for name in sweep.grid if len(sweep.grid[name]) > 1]
    rows = Table(box=SIMPLE_HEAD, pad_edge=False)
    to = [] if sweep.threshold is None else [f"steps to {sweep.threshold:g}", "least-most", "arrived"]
    for column in ("method", *names, "runs", f"median {sweep.metric}", "mean", "sd", *to):
        rows.add_column(column, justify="left" if column == "method" else "right")
    for each in chosen:
        finals = np.array([result.final for result in each.results if not result.failed])
        spread = finals.std(ddof=1) if len(finals) > 1 else 0.0
        numbers = [f"{value:.4f}" for value in (np.median(finals), finals.mean(), spread)] if len(finals) else ["-"] * 3
        if sweep.threshold is not None:
            steps = arrivals(_reached(sweep, each))
            numbers += [_steps(steps.median), f"{_steps(steps.least)}-{_steps(steps.most)}", f"{steps.arrived} of {steps.of}"]
        point = dict(each.point)
        rows.add_row(each.method, *(str(point[name]) for name in names), str(len(each.results)), *numbers)
    against = [_against(sweep, chosen[0], other) for other in chosen[1:]]
    notes = [f"{each.method}: its best {each.edge} lies at the edge of the grid; widen it" for each in chosen if each.edge]
    failed = [(each.method, sum(result.failed for result in each.results)) for each in chosen]
    notes += [f"{method}: {count} runs diverged, and are left out of the numbers above" for method, count in failed if count]
    if len(sweep.teacher_seeds) == 1:
        notes.append("one teacher: intervals are over its students alone")
    return "\n".join([plain(rows), *against, *(f"note: {note}" for note in notes)])


def rows_of(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Every run, for a CSV: method, seeds, settings, address, the metric at the end and steps to the threshold."""
    for method, points in collect(sweep).items():
        for point, results in points.items():
            for result in results:
                cell = result.cell
                seeds = {"method": method, "teacher_seed": cell.teacher_seed, "student_seed": cell.student_seed, **dict(point)}
                reached = None if sweep.threshold is None else result.reached(sweep.threshold, rising=sweep.metric == "accuracy")
                yield {**seeds, "address": cell.address, sweep.metric: result.final, "steps_to_threshold": reached}


def figure(sweep: Sweep, output: Path) -> Path:
    """Left the teachers, right the methods at their best points: the mean over seeds, and a band from the least to the most."""
    teachers, chosen = teacher_curves(sweep), choose(sweep)
    drawn, panels = new_figure(2 if teachers else 1)
    if teachers:
        _band(panels[0], teachers, "teacher", PALETTE[-1])
        label_axes(panels[0], f"teacher's held-out {sweep.metric}", "teacher's steps")
    for number, each in enumerate(chosen):
        _band(panels[-1], each.results, each.method, PALETTE[number % (len(PALETTE) - 1)])
    label_axes(panels[-1], f"held-out {sweep.metric}", "student's steps")
    panels[-1].legend(frameon=False, fontsize=8)
    return save(drawn, output)


def _against(sweep: Sweep, first: Chosen, other: Chosen) -> str:
    differences: dict[int, list[float]] = {}
    for own, its in zip(first.results, other.results, strict=True):
        if not (own.failed or its.failed):
            differences.setdefault(own.cell.teacher_seed, []).append(own.final - its.final)
    line = f"{first.method} - {other.method}: "
    if not differences:
        return line + "no pair of seeds in which neither diverged"
    found = paired(differences)
    line += f"{found.mean:+.4f} {sweep.metric}, 95 % between {found.low:+.4f} and {found.high:+.4f}"
    if sweep.threshold is not None:
        before, alike, after = first_of(_reached(sweep, first), _reached(sweep, other))
        line += f"; at {sweep.threshold:g} first in {before} pairs, alike in {alike}, later in {after}"
    return line


def _reached(sweep: Sweep, chosen: Chosen) -> list[int | None]:
    assert sweep.threshold is not None
    return [result.reached(sweep.threshold, rising=sweep.metric == "accuracy") for result in chosen.results]


def _steps(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "never"


def _merit(sweep: Sweep, results: tuple[Result, ...]) -> tuple[float, float, float]:
    """Runs that arrived, less their mean steps, the mean of the metric at the end: the larger, the better."""
    rising = sweep.metric == "accuracy"
    values = [result.final for result in results]
    final = -math.inf if any(map(math.isnan, values)) else float(np.mean(values)) * (1.0 if rising else -1.0)
    if sweep.threshold is None:
        return 0, 0.0, final
    steps = [step for result in results if (step := result.reached(sweep.threshold, rising=rising)) is not None]
    return len(steps), -float(np.mean(steps)) if steps else 0.0, final


def _band(axes: Any, results: list[Result] | tuple[Result, ...], name: str, colour: str) -> None:
    whole = [result for result in results if not result.failed]
    if not whole:
        return
    curves = np.stack([result.values for result in whole])
    axes.plot(whole[0].steps, curves.mean(axis=0), color=colour, linewidth=1.6, label=name)
    axes.fill_between(whole[0].steps, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.18, linewidth=0)


def _read(sweep: Sweep, cell: Cell) -> Result:
    folder = sweep.folder / cell.address
    how = ended(folder)
    if how is None:
        seeds = f"teacher seed {cell.teacher_seed}, student seed {cell.student_seed}" if cell.method else "a teacher"
        raise UserError(f"{folder}: {cell.method} {seeds} has not been made; `megapd sweep` goes on with it")
    steps, values = series(current(read_metrics(folder)), "eval", sweep.metric)
    return Result(cell, bool(how.error), steps, values)
