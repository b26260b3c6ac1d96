"""run.json: what a run is, kept in its folder from before its first step on."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megapd.errors import UserError
from megapd.files import sealed, unsealed, write_atomic

FORMAT = "megapd-run/1"
FILE = "run.json"  # in the run's folder


@dataclass
class RunRecord:
    """A run's identity. `write` replaces the file; nothing else does.

    id        128 random bits, hexadecimal: every file that belongs to the run names it
    digests   of what it reads: data, vocabulary
    settings  the whole tree as it is now, secrets masked
    segments  one a start that made a step: when, at which step, versions, ranks, host, and settings that changed
    parent    of a branch: id, folder and step that it began at
    saved     student steps of the newest checkpoint that was written, -1: none
    lines     digest of the lines of metrics.jsonl up to there
    adopted   begun by a megapd that kept no run.json: its files name no run
    numerics  version of the numbers that it began with, see numerics.py
    """

    path: Path
    id: str
    digests: dict[str, str]
    settings: dict[str, Any]
    segments: list[dict[str, Any]] = field(default_factory=list)
    parent: dict[str, Any] | None = None
    saved: int = -1
    lines: str = ""
    adopted: bool = False
    numerics: int = 1

    @property
    def began(self) -> bool:
        """Whether a step was made, or a checkpoint written. Until then the folder binds nobody to its settings."""
        return bool(self.segments) or self.saved >= 0

    def write(self) -> None:
        tree = {"format": FORMAT, **{key: value for key, value in vars(self).items() if key != "path"}}
        write_atomic(self.path, sealed(tree))


def new_record(folder: Path, digests: Mapping[str, str], settings: Mapping[str, Any], **values: Any) -> RunRecord:
    return RunRecord(folder / FILE, secrets.token_hex(16), dict(digests), dict(settings), **values)


def read_record(folder: Path) -> RunRecord | None:
    """None: there is none. Raises UserError for a damaged one."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        tree = unsealed(path.read_text())
        if tree.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        record = RunRecord(path, **tree)
        if not (isinstance(record.id, str) and isinstance(record.settings, dict) and isinstance(record.saved, int)):
            raise ValueError("an entry of another type")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); restore it from a copy, or start a run of another name") from error
    return record
