"""Whether the disk has room for what a run will write."""

from __future__ import annotations

import errno
import os
import shutil

from megapd.config import Config
from megapd.errors import DiskFailed
from megapd.files import disk_failure

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """Of a resumable checkpoint: fp32 weights, and AdamW's two fp32 moments or the momentum of SGD."""
    moments = 2 if config.optimizer.kind == "adamw" else int(config.optimizer.momentum > 0)
    return 4 * parameters * (1 + moments)


def room_for(config: Config, parameters: int) -> int:
    """Bytes of the checkpoints that are kept, of the one being written, and of the trajectory."""
    every = config.trajectory.every
    steps = len(config.trajectory.steps) + (-(-config.training.steps // every) if every else 0)
    kept = (config.checkpoint.keep + 1) * checkpoint_bytes(config, parameters)
    return kept + steps * parameters * WEIGHT_BYTES[config.training.precision]


def check_room(config: Config, parameters: int) -> int:
    """Bytes that are free. DiskFailed where they would not take one checkpoint."""
    place = config.folder
    while not place.exists():
        place = place.parent
    free, need = shutil.disk_usage(place).free, checkpoint_bytes(config, parameters)
    if free < need:
        told = disk_failure(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), place)
        raise DiskFailed(f"runs_dir: a checkpoint takes {need:,} bytes, {told}")
    return free
