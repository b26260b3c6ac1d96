"""`megapd plot`: curves of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megapd.analysis.plots import plot_runs


def plot(folders: Sequence[Path], output: Path | None) -> int:
    """output: of the picture; None: plots/curves.png in the first run's folder."""
    for written in plot_runs(folders, output or folders[0] / "plots" / "curves.png"):
        print(written)
    return 0
