"""A run's folder: who it is, who may write to it, and whether all of it is there."""

from megapd.training.folder.branch import branch
from megapd.training.folder.lock import held
from megapd.training.folder.metrics import METRICS, MetricsFile, changed_lines, named_run, numbers, recorded, tell_changed
from megapd.training.folder.open import (
    RunFolder,
    agree,
    check_config,
    check_weights,
    examine,
    open_folder,
    seen_by_all,
    write_config,
)
from megapd.training.folder.record import RunRecord, read_record
from megapd.training.folder.room import check_room, room_for

__all__ = [
    "METRICS",
    "MetricsFile",
    "RunFolder",
    "RunRecord",
    "agree",
    "branch",
    "changed_lines",
    "check_config",
    "check_room",
    "check_weights",
    "examine",
    "held",
    "named_run",
    "numbers",
    "open_folder",
    "read_record",
    "recorded",
    "room_for",
    "seen_by_all",
    "tell_changed",
    "write_config",
]
