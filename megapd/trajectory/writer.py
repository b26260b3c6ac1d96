"""Write one checkpoint of a trajectory: streamed in shards, whole or not at all."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megapd.errors import UserError
from megapd.files import commit_folder, sha256_file, temporary_folder
from megapd.trajectory.reader import FORMAT, INDEX, META, Checkpoint, File, check_files, read_meta, step_folder, weights_digest

log = logging.getLogger(__name__)


def write_checkpoint(
    folder: Path,
    step: int,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    config: dict[str, Any],
    vocabulary: str,
    metrics: dict[str, Any],
    shard_bytes: int,
    run: str = "",
) -> Checkpoint:
    """Write folder/step_N from `tensors`, (name, tensor) pairs of any dtype, device and strides under unique names.

    The iterable is consumed once; each tensor is copied to the host before the next is asked for, and at most one shard
    (shard_bytes, or one larger tensor) is held. So it may yield views of a buffer that it reuses, or parameters gathered one at
    a time.

    The folder appears when all is written and flushed. If `tensors` raises, nothing is left. A checkpoint that is there already
    is kept if it is whole and of the same weights and vocabulary (a resumed run writes the same again), else replaced. `config`
    and `metrics` must be JSON trees; numbers that are not finite become null. run: the id of the run that writes it.
    """
    assert step >= 0
    assert shard_bytes > 0
    final = Path(folder) / step_folder(step)
    with temporary_folder(final) as temporary:
        files = _write_weights(temporary, tensors, shard_bytes)
        digest = weights_digest(files)
        kept = _kept(final, digest, vocabulary)
        if kept is not None:
            return kept
        meta = {
            "format": FORMAT,
            "step": step,
            **({"run": run} if run else {}),
            "config": _finite(config),
            "vocabulary": vocabulary,
            "metrics": _finite(metrics),
            "files": {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in sorted(files.items())},
            "digest": digest,
        }
        (temporary / META).write_text(json.dumps(meta, indent=1, allow_nan=False))
        commit_folder(temporary, final)
    return read_meta(final)


def _write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> dict[str, File]:
    """Shards and index into `folder`; the sha256 and size of each."""
    shards: list[list[str]] = []
    names: set[str] = set()
    held: dict[str, Tensor] = {}
    held_bytes = total = 0

    def flush() -> None:
        nonlocal held_bytes
        shards.append(list(held))
        save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        held.clear()
        held_bytes = 0

    for name, tensor in tensors:
        assert name not in names, f"two tensors are called {name}"
        names.add(name)
        size = tensor.numel() * tensor.element_size()
        if held and held_bytes + size > shard_bytes:
            flush()
        held[name] = _host_copy(tensor)
        held_bytes += size
        total += size
    assert names, "a checkpoint of no tensors"
    if held:
        flush()

    weight_map: dict[str, str] = {}
    files: dict[str, File] = {}
    for number, members in enumerate(shards, start=1):
        shard = f"model-{number:05d}-of-{len(shards):05d}.safetensors"  # as Hugging Face names them
        os.rename(folder / f"shard-{number}", folder / shard)
        weight_map |= dict.fromkeys(members, shard)
        files[shard] = _file(folder / shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1))
    files[INDEX] = _file(folder / INDEX)
    return files


def _host_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy on the host that shares memory with nothing, made with one allocation."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _file(path: Path) -> File:
    return File(sha256_file(path), path.stat().st_size)


def _kept(final: Path, digest: str, vocabulary: str) -> Checkpoint | None:
    """The checkpoint at `final` if it need not be replaced."""
    if not final.exists():
        return None
    try:
        there = read_meta(final)
        check_files(there)
    except UserError as error:
        log.warning("replacing a damaged checkpoint: %s", error)
        return None
    if there.digest == digest and there.vocabulary == vocabulary:
        return there
    log.warning("%s: replacing weights %s by %s", final, there.digest[:12], digest[:12])
    return None


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
