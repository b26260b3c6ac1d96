"""`megapd export RUN OUT`: a run's weights as a folder that transformers reads."""

from __future__ import annotations

from pathlib import Path

from megapd.config import Config
from megapd.training.export import export


def export_run(
    config: Config, output: Path, *, step: int | None = None, dtype: str | None = None, shard_bytes: int = 5 << 30
) -> int:
    """`megapd export RUN [--step S] [--dtype D] [--shard-bytes B] OUT`: prints what was exported."""
    done = export(config, output, step=step, dtype=dtype, shard_bytes=shard_bytes)
    print(f"{done.folder}: step {done.step} of {config.folder} ({done.source})")
    return 0
