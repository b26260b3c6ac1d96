"""The ordered checkpoints of one teacher run: weights only, written while it trains, read by the students it teaches."""

from megapd.trajectory.format import Checkpoint
from megapd.trajectory.listing import CheckpointTimeout
from megapd.trajectory.reader import Checkpoints, Trajectory, check_files
from megapd.trajectory.writer import write_checkpoint

__all__ = ["Checkpoint", "CheckpointTimeout", "Checkpoints", "Trajectory", "check_files", "write_checkpoint"]
