"""The student's training: a run, its loop, and what is hooked to them."""

from megapd.training.callbacks import checkpoint_config
from megapd.training.engine import deepspeed_config, parameter_groups, start_world
from megapd.training.loop import TrainingResult, train
from megapd.training.run import Callback, Run, StepResult
from megapd.training.start import build_student, student_engine
from megapd.training.state import CheckpointStore
from megapd.training.teaching import Teaching
from megapd.training.trackers import Tracker

__all__ = [
    "Callback",
    "CheckpointStore",
    "Run",
    "StepResult",
    "Teaching",
    "Tracker",
    "TrainingResult",
    "build_student",
    "checkpoint_config",
    "deepspeed_config",
    "parameter_groups",
    "start_world",
    "student_engine",
    "train",
]
