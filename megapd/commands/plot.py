"""`megapd plot`: curves of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megapd.analysis.plots import plot_runs
from megapd.files import check_run
from megapd.training.folder import METRICS, named_run, read_record, tell_changed


def plot(folders: Sequence[Path], output: Path | None) -> int:
    """output: of the picture; None: plots/curves.png in the first run's folder."""
    for folder in folders:
        record = read_record(folder)
        if record is not None:
            check_run(folder / METRICS, named_run(folder / METRICS), record.id)
            tell_changed(folder / METRICS, record.saved, record.lines)
    for written in plot_runs(folders, output or folders[0] / "plots" / "curves.png"):
        print(written)
    return 0
