"""A trajectory by what a user names: its folder, that of its run, or a published model."""

from __future__ import annotations

from pathlib import Path

from megapd.errors import UserError
from megapd.trajectory.hugging_face import HuggingFaceTrajectory, is_hugging_face
from megapd.trajectory.reader import Trajectory


def open_checkpoints(source: str, steps: tuple[int, ...] = (), *, must_exist: bool = True) -> Trajectory | HuggingFaceTrajectory:
    """Those that a folder (a trajectory's or its run's), a pattern or hf:REPO stands for. UserError if there are none.

    steps: of a published one, those that there are; empty: all that are found.
    """
    folder = Path(source)
    within = folder / "trajectory"
    if is_hugging_face(source) and not within.is_dir():
        return HuggingFaceTrajectory(source, steps)
    if steps:
        raise UserError(f"--steps: {source} is megapd's own trajectory, which knows its steps; leave them out")
    return Trajectory(within if within.is_dir() else folder, must_exist=must_exist)
