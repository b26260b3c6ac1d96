"""`megapd doctor`: a table of what was found out of a configuration, its machines and its run."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megapd.config import Config, load
from megapd.errors import UserError, masked
from megapd.processes.checks import Check, checks
from megapd.training import start_world

FILE_COLUMNS = 500  # in a log a check is one line
STYLES = {"ok": "green", "warning": "yellow", "FAULT": "bold red"}


def examine_all(overrides: list[str], source: Path | None) -> int:
    """`megapd doctor CONFIG|RUN [settings]`; 2 if one is a fault. Rank 0 prints."""
    config = _configuration(overrides, source)
    world = start_world()
    found = list(checks(config, world))
    faults = sum(check.state == "FAULT" for check in found)
    if world.rank == 0:
        show(found)
    return 2 if faults else 0


def show(found: list[Check]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in found:
        table.add_row(check.name, f"[{STYLES[check.state]}]{check.state}[/]", escape(masked(check.found)))
    console = Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)
    console.print(table, highlight=False)
    faults, warnings = (sum(check.state == state for check in found) for state in ("FAULT", "warning"))
    console.print(f"{len(found)} checks, {faults} faults, {warnings} warnings", highlight=False)


def _configuration(overrides: list[str], source: Path | None) -> Config:
    if source is None or not source.is_dir():
        return load(source, overrides)
    place = [f"--runs_dir={source.absolute().parent}", f"--name={source.absolute().name}"]
    if not (source / "config.yaml").exists():
        raise UserError(f"{source}: no run's folder, it has no config.yaml; restore it, or give a configuration's file")
    return load(source / "config.yaml", [*overrides, *place])
