"""A run's folder: who it is, who may write to it, and whether all of it is there."""

from megapd.training.folder.branch import branch
from megapd.training.folder.lock import held
from megapd.training.folder.metrics import METRICS, MetricsFile, numbers, recorded, tell_changed
from megapd.training.folder.open import RunFolder, agree, check_config, open_folder, write_config
from megapd.training.folder.record import RunRecord, read_record

__all__ = [
    "METRICS",
    "MetricsFile",
    "RunFolder",
    "RunRecord",
    "agree",
    "branch",
    "check_config",
    "held",
    "numbers",
    "open_folder",
    "read_record",
    "recorded",
    "tell_changed",
    "write_config",
]
