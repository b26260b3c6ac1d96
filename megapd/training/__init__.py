"""The student's training: a run, its loop, and what is hooked to them."""

from megapd.training.callbacks import checkpoint_config
from megapd.training.checkpoint import CheckpointStore
from megapd.training.engine import Engine, deepspeed_config, parameter_groups, start_world
from megapd.training.loop import TrainingResult, train, train_run
from megapd.training.run import Callback, Run, StepResult
from megapd.training.start import build_student, start, student_engine
from megapd.training.teaching import NoTeacher, Teaching
from megapd.training.trackers import Tracker

__all__ = [
    "Callback",
    "CheckpointStore",
    "Engine",
    "NoTeacher",
    "Run",
    "StepResult",
    "Teaching",
    "Tracker",
    "TrainingResult",
    "build_student",
    "checkpoint_config",
    "deepspeed_config",
    "parameter_groups",
    "start",
    "start_world",
    "student_engine",
    "train",
    "train_run",
]
