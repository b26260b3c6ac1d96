"""The ordered checkpoints of one teacher run: weights only, written while it trains, read by the students it teaches.

Its face lists checkpoints without torch, which takes seconds to import; `trajectory.writer` needs it.
"""

from megapd.trajectory.reader import Checkpoint, Checkpoints, CheckpointTimeout, Trajectory, check_files, named_runs

__all__ = ["Checkpoint", "CheckpointTimeout", "Checkpoints", "Trajectory", "check_files", "named_runs"]
