"""What a checkpoint of a trajectory looks like on disk.

    trajectory/
      step_1000/                               complete: renamed into place only when every file is flushed
        model-00001-of-00002.safetensors       weights, at most shard_bytes a shard (a larger tensor has one of its own)
        model-00002-of-00002.safetensors
        model.safetensors.index.json           Hugging Face form: {"metadata": {"total_size"}, "weight_map": {tensor: shard}}
        meta.json                              {"format", "step", "config", "vocabulary", "metrics", "files", "digest"}
      step_2000.tmp-4711/                      being written by process 4711, or left by its crash; never read

`files` gives each file's sha256 and size in bytes. `digest` is the sha256 over the lines "SHARD SHA256\\n" of the shards,
sorted by name: it names the weights, whatever the configuration and the metrics beside them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megapd.errors import UserError

FORMAT = "megapd-trajectory/1"
META = "meta.json"
INDEX = "model.safetensors.index.json"
KEYS = ("format", "step", "config", "vocabulary", "metrics", "files", "digest")

_STEP = re.compile(r"step_(0|[1-9][0-9]*)")
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")


@dataclass(frozen=True)
class File:
    """What meta.json says about one file: hexadecimal sha256, size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint, without its weights.

    step        optimizer steps the teacher had done
    path        its folder
    digest      names the weights (see the module)
    vocabulary  digest of what the token ids and classes mean: teacher and student must agree
    config      the resolved configuration of the teacher's run
    metrics     the teacher's latest metrics when it was written
    files       name -> sha256 and size of each file beside meta.json
    """

    step: int
    path: Path
    digest: str
    vocabulary: str
    config: dict[str, Any] = field(repr=False)
    metrics: dict[str, Any] = field(repr=False)
    files: dict[str, File] = field(repr=False)

    @property
    def shards(self) -> list[str]:
        return sorted(name for name in self.files if is_shard(name))


def step_folder(step: int) -> str:
    return f"step_{step}"


def parse_step(folder_name: str) -> int | None:
    """The step that a folder's name stands for; None for temporaries and everything else."""
    match = _STEP.fullmatch(folder_name)
    return int(match[1]) if match else None


def shard_name(number: int, of: int) -> str:
    """Hugging Face's name of shard `number` (from 1)."""
    return f"model-{number:05d}-of-{of:05d}.safetensors"


def is_shard(name: str) -> bool:
    return _SHARD.fullmatch(name) is not None


def weights_digest(files: Mapping[str, File]) -> str:
    """sha256 over the sorted "SHARD SHA256" lines; files that are no shards do not count."""
    lines = "".join(f"{name} {files[name].sha256}\n" for name in sorted(files) if is_shard(name))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_meta(path: Path) -> Checkpoint:
    """The checkpoint in folder `path`; UserError if its meta.json is missing, damaged or of another format."""
    meta = path / META
    try:
        tree = json.loads(meta.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: it has no {META}, so it is no complete checkpoint; copy it again, or remove it") from error
    except ValueError as error:
        raise UserError(f"{meta}: damaged, not valid JSON ({error}); restore the checkpoint") from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        found = tree.get("format") if isinstance(tree, dict) else None
        raise UserError(f"{meta}: its format is {found!r}, this megapd reads {FORMAT!r}; write the trajectory again")
    missing = [key for key in KEYS if key not in tree]
    if missing:
        raise UserError(f"{meta}: damaged, it lacks {', '.join(missing)}; restore the checkpoint")
    if tree["step"] != parse_step(path.name):
        raise UserError(
            f"{meta}: it is of step {tree['step']}, but its folder is {path.name}; rename it {step_folder(tree['step'])}"
        )
    try:
        files = {name: File(entry["sha256"], entry["bytes"]) for name, entry in tree["files"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{meta}: damaged, `files` does not give a sha256 and bytes for each; restore the checkpoint") from error
    checkpoint = Checkpoint(tree["step"], path, tree["digest"], tree["vocabulary"], tree["config"], tree["metrics"], files)
    if weights_digest(files) != checkpoint.digest or not checkpoint.shards:
        raise UserError(f"{meta}: damaged, digest {checkpoint.digest} is not that of the files listed; restore the checkpoint")
    return checkpoint
