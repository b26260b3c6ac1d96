"""What a sweep came to as Markdown: how it was made, its table, the paper's numbers beside it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import date
from pathlib import Path

from megapd.experiments.results import table
from megapd.experiments.runner import ended
from megapd.experiments.spec import Sweep, students_of, teachers_of


def report(sweep: Sweep, command: str, picture: Path) -> str:
    """command: that makes the sweep. picture: of its curves, named relative to where the text goes."""
    runs = {cell.address for cell in (*teachers_of(sweep).values(), *students_of(sweep))}
    endings = [ended(sweep.folder / run) for run in runs]
    assert None not in endings, "report what is made"
    seconds = sum(how.seconds for how in endings if how is not None)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("megapd", "torch", "deepspeed"))
    seeds = f"teacher seeds {_listed(sweep.teacher_seeds)}, student seeds {_listed(sweep.student_seeds)}"
    made = f"{len(runs)} runs, {seconds / 3600:.1f} hours of one thread each; {platform.machine()}, {os.cpu_count()} cores"
    lines = [
        f"## {sweep.title or sweep.name}",
        "",
        f"`{command}` ({made}; {versions}; {date.today().isoformat()}); {seeds}.",
        "",
        "```",
        table(sweep),
        "```",
        "",
        f"![curves]({picture})",
        "",
    ]
    lines += [
        part for told in (sweep.finding, sweep.paper and f"The paper: {sweep.paper}") if told for part in (told.strip(), "")
    ]
    return "\n".join(lines)


def _listed(seeds: tuple[int, ...]) -> str:
    return ", ".join(map(str, seeds))
