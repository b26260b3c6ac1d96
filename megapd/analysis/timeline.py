"""Tables for the terminal; a plan as one."""

from __future__ import annotations

import io

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megapd.schedule.plan import Plan

SHOWN = 24  # rotations; of a longer plan the middle is left out
FIRST = 14


def describe_plan(plan: Plan) -> str:
    """Which student steps each checkpoint teaches, a line a rotation, as plain text; then the plan's warnings."""
    rotations = plan.rotations()
    ends = [*plan.starts[1:], plan.steps]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("rotation", "student steps", "for", "teacher's step"):
        table.add_column(column, justify="right")
    rows = [
        (str(number), f"{start:,} - {end - 1:,}" if end - start > 1 else f"{start:,}", f"{end - start:,}", f"{teacher:,}")
        for number, ((start, teacher), end) in enumerate(zip(rotations, ends, strict=True))
    ]
    hidden = len(rows) - SHOWN
    if hidden > 1:
        rows[FIRST : FIRST + hidden] = [("...", f"{hidden:,} more", "...", "...")]
    for row in rows:
        table.add_row(*row)
    distinct = len(set(plan.teachers))
    title = f"schedule {plan.policy}: {_count(distinct, 'checkpoint')} over {_count(plan.steps, 'student step')}"
    return "\n".join([title, plain(table), "", *(f"warning: {warning}" for warning in plan.warnings)]).rstrip()


def plain(table: Table) -> str:
    """The table as plain text, of at most 100 columns."""
    screen = Console(file=io.StringIO(), width=100, color_system=None, force_terminal=False, legacy_windows=False)
    screen.print(table)
    assert isinstance(screen.file, io.StringIO)
    return "\n".join(line.rstrip() for line in screen.file.getvalue().splitlines()).rstrip()


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
