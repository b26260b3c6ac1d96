"""Curriculum metrics as a table, a CSV and a picture."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from megapd.analysis.plots import PALETTE, label_axes, new_figure, save
from megapd.analysis.timeline import plain
from megapd.files import write_atomic

Found = Mapping[int, Mapping[str, float]]  # teacher step -> numbers by name

_SPREAD = re.compile(r"_(mean|sd|p\d+)$")  # beside a median: in the CSV alone
_NUMBERED = re.compile(r"_(\d+)")  # a curve of a panel
_DISTANCES = ("m_robust", "m_close")


def in_l1(found: Found) -> dict[int, dict[str, float]]:
    """With total variations as the full L1 norm, as the paper's code prints them."""
    return {
        step: {name: 2.0 * value if name.startswith(_DISTANCES) else value for name, value in values.items()}
        for step, values in found.items()
    }


def panels(found: Found) -> dict[str, list[str]]:
    """What there is room for, in groups whose names differ in a number alone, as m_robust_2 to m_robust_5."""
    names = dict.fromkeys(name for values in found.values() for name in values if not _SPREAD.search(name))
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_NUMBERED.sub("", name), []).append(name)
    return groups


def describe(found: Found) -> str:
    """A table a group, a line a checkpoint."""
    tables = []
    for columns in panels(found).values():
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in ("step", *columns):
            table.add_column(column, justify="right")
        for step, values in found.items():
            table.add_row(f"{step:,}", *(f"{values[name]:.4g}" if name in values else "-" for name in columns))
        tables.append(plain(table))
    return "\n".join(tables)


def write_report(found: Found, output: Path) -> list[Path]:
    """A PNG, and the CSV of the same name with columns step, name, value. Returns both paths."""
    picture = save_picture(found, output)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("step", "name", "value"))
    writer.writerows((step, name, value) for step, values in found.items() for name, value in values.items())
    numbers = picture.with_suffix(".csv")
    write_atomic(numbers, table.getvalue())
    return [picture, numbers]


def save_picture(found: Found, output: Path) -> Path:
    """A panel a group."""
    groups = panels(found)
    figure, axes = new_figure(len(groups))
    for panel, (group, names) in zip(axes, groups.items(), strict=True):
        for name in names:
            steps, values = np.array([(step, values[name]) for step, values in found.items() if name in values]).T
            numbered = _NUMBERED.search(name)
            colour = PALETTE[int(numbered[1]) % len(PALETTE)] if numbered else PALETTE[0]
            panel.plot(steps, values, color=colour, linewidth=1.4, marker="o", markersize=2.5, label=name)
        label_axes(panel, group, "teacher's steps")
        panel.legend(frameon=False, fontsize=7)
    return save(figure, output)
