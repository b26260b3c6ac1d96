"""`megapd trajectory list`, `verify` and `suggest` of a folder, which need no scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megapd.analysis.suggest import describe_found, describe_trajectory, open_folder, plot_found, suggest
from megapd.config import Config
from megapd.trajectory import Trajectory
from megapd.trajectory.hugging_face import HuggingFaceTrajectory


def list_checkpoints(folder: Path) -> int:
    print(describe_trajectory(open_folder(folder)))
    return 0


def verify_folder(folder: Path) -> int:
    """Hash every file again; 1 if something is wrong."""
    return _verified(open_folder(folder), str(folder))


def verify_published(config: Config, spec: str) -> int:
    """Of a Hugging Face model, teacher.steps of it, or all that there are; from the hub they are fetched."""
    return _verified(HuggingFaceTrajectory(spec, () if config.teacher is None else config.teacher.steps), spec)


def _verified(trajectory: Trajectory | HuggingFaceTrajectory, name: str) -> int:
    problems = trajectory.verify()
    for problem in problems:
        print(problem)
    print(f"{name}: {len(trajectory.steps)} checkpoints, {len(problems)} problems")
    return 1 if problems else 0


def suggest_transition(
    overrides: Sequence[str], source: Path, checkpoints: int | None, metric: str | None, output: Path | None
) -> int:
    found, picture = suggest(source, list(overrides), checkpoints, metric)
    print(describe_found(found))
    print(plot_found(found, output or picture))
    return 0
