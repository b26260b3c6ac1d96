"""Where a configuration says that the teacher is: its trajectory, and the replicas that serve it. Without torch.

What talks to a served teacher is imported where one is named: pyarrow's Flight and a model's types take long.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megapd.config import Config
from megapd.trajectory import Checkpoints, Trajectory
from megapd.trajectory.hugging_face import HuggingFaceTrajectory, is_hugging_face

if TYPE_CHECKING:
    from megapd.teacher.client import Endpoints


def open_trajectory(config: Config) -> Checkpoints:
    """The trajectory that teacher.trajectory names, or where it names none, the one that the endpoints serve."""
    assert config.teacher is not None
    named = config.teacher.trajectory
    if named is None:
        from megapd.teacher.client import RemoteTrajectory

        return RemoteTrajectory(config.teacher, open_endpoints(config))
    if is_hugging_face(named):
        return HuggingFaceTrajectory(named, config.teacher.steps)
    waits = config.schedule is not None and config.schedule.waits is not None
    return Trajectory(Path(named), must_exist=not waits)


def open_endpoints(config: Config) -> Endpoints:
    """Where the served teacher's replicas are: as the configuration names them, or else as the scheduler does."""
    from megapd.scheduler.client.lease import LeasedEndpoints
    from megapd.teacher.client import FixedEndpoints

    assert config.teacher is not None
    if config.teacher.endpoints:
        return FixedEndpoints(config.teacher.endpoints)
    return LeasedEndpoints(config.scheduler, config.name)
