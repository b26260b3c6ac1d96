"""The configuration: `load` builds a Config from a file, the environment and the command line; its sections by their rooms."""

from megapd.config.base import Section
from megapd.config.corpus import CorpusConfig, SourceConfig, TokenizerConfig
from megapd.config.distillation import Divergence, LossConfig, TeacherConfig, TeacherServerConfig
from megapd.config.model import MLPConfig, ModelConfig, TransformerConfig
from megapd.config.schedule import (
    AdaptiveConfig,
    EqualConfig,
    ExplicitConfig,
    FollowConfig,
    GeometricConfig,
    MatchedConfig,
    OneShotConfig,
    RangeConfig,
    ScheduleConfig,
    TransitionConfig,
)
from megapd.config.scheduler import SchedulerConfig
from megapd.config.task import HierarchicalParityConfig, ParityConfig, TaskConfig, TextConfig
from megapd.config.training import (
    CheckpointConfig,
    EvaluationConfig,
    LearningRateConfig,
    OptimizerConfig,
    TelemetryConfig,
    TrainingConfig,
    TrajectoryWriterConfig,
)
from megapd.config.tree import RETIRED_SETTINGS, Config, dump, flatten, load, parse_overrides

__all__ = [
    "RETIRED_SETTINGS",
    "AdaptiveConfig",
    "CheckpointConfig",
    "Config",
    "CorpusConfig",
    "Divergence",
    "EqualConfig",
    "EvaluationConfig",
    "ExplicitConfig",
    "FollowConfig",
    "GeometricConfig",
    "HierarchicalParityConfig",
    "LearningRateConfig",
    "LossConfig",
    "MLPConfig",
    "MatchedConfig",
    "ModelConfig",
    "OneShotConfig",
    "OptimizerConfig",
    "ParityConfig",
    "RangeConfig",
    "ScheduleConfig",
    "SchedulerConfig",
    "Section",
    "SourceConfig",
    "TaskConfig",
    "TeacherConfig",
    "TeacherServerConfig",
    "TelemetryConfig",
    "TextConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "TrajectoryWriterConfig",
    "TransformerConfig",
    "TransitionConfig",
    "dump",
    "flatten",
    "load",
    "parse_overrides",
]
