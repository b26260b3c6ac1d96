"""`megapd trajectory list`, `verify` and `suggest` of what teacher.trajectory may name; they need no scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megapd.analysis.suggest import describe_found, describe_trajectory, open_source, plot_found, suggest


def list_checkpoints(source: str, steps: tuple[int, ...] = ()) -> int:
    print(describe_trajectory(open_source(source, steps)))
    return 0


def verify_source(source: str, steps: tuple[int, ...] = ()) -> int:
    """Hash every file again; 1 if something is wrong. From the hub every checkpoint is fetched."""
    trajectory = open_source(source, steps)
    problems = trajectory.verify()
    for problem in problems:
        print(problem)
    print(f"{source}: {len(trajectory.steps)} checkpoints, {len(problems)} problems")
    return 1 if problems else 0


def suggest_transition(
    overrides: Sequence[str],
    source: Path,
    checkpoints: int | None,
    metric: str | None,
    output: Path | None,
    probe_samples: int = 0,
) -> int:
    found, picture = suggest(source, list(overrides), checkpoints, metric, probe_samples)
    print(describe_found(found))
    print(plot_found(found, output or picture))
    return 0
