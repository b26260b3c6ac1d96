"""`megapd trajectory list`, `verify` and `suggest` of a folder, which need no scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megapd.analysis.suggest import describe_found, describe_trajectory, open_folder, plot_found, suggest


def list_checkpoints(folder: Path) -> int:
    print(describe_trajectory(open_folder(folder)))
    return 0


def verify_folder(folder: Path) -> int:
    """Hash every file again; 1 if something is wrong."""
    trajectory = open_folder(folder)
    problems = trajectory.verify()
    for problem in problems:
        print(problem)
    print(f"{folder}: {len(trajectory.steps)} checkpoints, {len(problems)} problems")
    return 1 if problems else 0


def suggest_transition(
    overrides: Sequence[str], source: Path, checkpoints: int | None, metric: str | None, output: Path | None
) -> int:
    found, picture = suggest(source, list(overrides), checkpoints, metric)
    print(describe_found(found))
    print(plot_found(found, output or picture))
    return 0
