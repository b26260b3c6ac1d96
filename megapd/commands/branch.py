"""`megapd branch`: another run that goes on from a checkpoint of a run."""

from __future__ import annotations

from pathlib import Path

from megapd.config import load, parse_overrides
from megapd.training.folder import branch


def branch_run(overrides: list[str], folder: Path, name: str, at: int | None) -> int:
    """`megapd branch RUN --as NAME [--at STEP] [settings]`; the new run lies beside RUN, and waits for `megapd train`."""
    config = load(folder / "config.yaml", [*overrides, f"--name={name}", f"--runs_dir={folder.absolute().parent}"])
    step = branch(folder, config, at, parse_overrides(overrides))
    saved = folder.parent / name / "config.yaml"
    print(f"{name} begins at step {step:,} of {folder}; go on with: megapd train {saved}")
    return 0
