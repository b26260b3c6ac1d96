"""Import a trajectory's checkpoints, and watch one that grows. This and verify.py read files, on the machine that has them."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from megapd.errors import UserError
from megapd.scheduler.client.http import Api
from megapd.scheduler.registry.rules import Flags, judge
from megapd.trajectory import Checkpoint, Checkpoints
from megapd.trajectory.digests import safetensors_header
from megapd.trajectory.opening import open_checkpoints

HASH_BYTES = 1 << 20  # at once

# Weights of output layers, and of the embeddings that stand in for one that is tied, as megapd and published models call them.
_HEADS = re.compile(r"(^|\.)(head|lm_head|embed_out|cls\.predictions\.decoder)\.weight$")
_EMBEDDINGS = re.compile(r"(^|\.)(tokens|wte|word_embeddings|embed_tokens|embed_in|shared)\.weight$")

Probe = Callable[[Any, Checkpoint], float]  # (trajectory, checkpoint) -> loss on a sample that is the same for all checkpoints


class Imported(NamedTuple):
    """digest of the trajectory; steps that were new, steps that it had already."""

    digest: str
    added: tuple[int, ...]
    known: tuple[int, ...]


def import_trajectory(
    api: Api, source: str, *, steps: tuple[int, ...] = (), name: str | None = None, probe: Probe | None = None
) -> Imported:
    """Register what is there. Twice does the same as once; what was added to the files since is added.

    The files' sha256 are those that the checkpoint's writer recorded, or, of published ones, those that they have now; `verify`
    compares them. Raises UserError, naming the step, where a checkpoint that is registered has become another one.
    """
    files = open_checkpoints(source, steps)
    if not files.steps:
        raise UserError(f"{source}: no complete checkpoint")
    digest = _add_trajectory(api, files, source, name)
    return Imported(digest, *_register(api, digest, files, source, probe, stop=None))


def watch_trajectory(
    api: Api,
    source: str,
    stop: threading.Event,
    *,
    poll_seconds: float = 5.0,
    name: str | None = None,
    probe: Probe | None = None,
    told: Callable[[int], None] = lambda step: None,
) -> str | None:
    """Register a teacher's checkpoints, each as it appears, until `stop`; the trajectory's digest, None if there was none.

    told: called with each new step. The rules that need no hashing are looked at whenever something is new.
    """
    digest = None
    while True:
        files = open_checkpoints(source, must_exist=False)
        if files.steps:
            if digest is None:
                digest = _add_trajectory(api, files, source, name)
            added, _ = _register(api, digest, files, source, probe, stop)
            if added:
                records = registered(api, digest)
                found = judge(records)
                for record in records:
                    for flag in record["flags"]:
                        if flag["kind"] == "changed":
                            found.setdefault(record["step"], {})["changed"] = flag["detail"]
                set_flags(api, digest, found)
            for step in added:
                told(step)
        if stop.wait(poll_seconds):
            return digest


def registered(api: Api, digest: str) -> list[dict[str, Any]]:
    """The records of a trajectory's checkpoints, in the order of their steps."""
    return api.pages(f"/v1/trajectories/{digest}/checkpoints", "step", -1)


def set_flags(api: Api, digest: str, flags: Flags) -> list[dict[str, Any]]:
    """Instead of those that there were; the flagged checkpoints."""
    flagged: list[dict[str, Any]] = api.ask("PUT", f"/v1/trajectories/{digest}/flags", {"flags": flags})
    return flagged


def _add_trajectory(api: Api, files: Checkpoints, source: str, name: str | None) -> str:
    first = files.checkpoint(files.steps[0])
    body = {"run": _run_of(first), "location": _location(source), "vocabulary": first.vocabulary, "name": name}
    return str(api.ask("POST", "/v1/trajectories", body)["digest"])


def _register(
    api: Api, digest: str, files: Checkpoints, source: str, probe: Probe | None, stop: threading.Event | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    known = {record["step"]: record for record in registered(api, digest)}
    added: list[int] = []
    for step in files.steps:
        if stop is not None and stop.is_set():
            break
        checkpoint = files.checkpoint(step)
        if step in known:
            if known[step]["weights"] != checkpoint.digest:
                raise UserError(
                    f"{checkpoint.path}: its weights are {checkpoint.digest[:12]} now, but {known[step]['weights'][:12]} are "
                    f"registered; look at `megapd trajectory verify`, or copy the trajectory elsewhere and import that"
                )
            continue
        record = record_of(checkpoint, _location(source, checkpoint), None if probe is None else probe(files, checkpoint))
        api.ask("POST", f"/v1/trajectories/{digest}/checkpoints", record)
        added.append(step)
    return tuple(added), tuple(step for step in files.steps if step in known)


def record_of(checkpoint: Checkpoint, location: str, probe_loss: float | None) -> dict[str, Any]:
    """What is registered of a checkpoint; see api.NewCheckpoint."""
    return {
        "step": checkpoint.step,
        "location": location,
        "weights": checkpoint.digest,
        "head": head_digest(checkpoint),
        "tokenizer": checkpoint.vocabulary,
        "files": {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in sorted(checkpoint.files.items())},
        "metrics": checkpoint.metrics,
        "probe_loss": probe_loss,
    }


def head_digest(checkpoint: Checkpoint) -> str | None:
    """sha256 over "DTYPE SHAPE\\n" and the bytes of the output layer's weight; None where it is not found, as in pickled files.

    It is equal for equal weights however the file around them is laid out, which the file's own sha256 is not.
    """
    found: dict[bool, tuple[Path, int, dict[str, Any]]] = {}
    for name in sorted(checkpoint.files):
        if name.endswith(".safetensors"):
            begin, tensors = safetensors_header(checkpoint.path / name)
            for tensor, entry in sorted(tensors.items()):
                for is_head, expression in ((True, _HEADS), (False, _EMBEDDINGS)):
                    if expression.search(tensor):
                        found.setdefault(is_head, (checkpoint.path / name, begin, entry))
    if not found:
        return None
    path, begin, entry = found.get(True) or found[False]
    first, end = entry["data_offsets"]
    hashed = hashlib.sha256(f"{entry['dtype']} {entry['shape']}\n".encode())
    with path.open("rb") as file:
        file.seek(begin + first)
        for start in range(first, end, HASH_BYTES):
            hashed.update(file.read(min(HASH_BYTES, end - start)))
    return hashed.hexdigest()


def _run_of(checkpoint: Checkpoint) -> str:
    name = checkpoint.config.get("name")
    fallback = re.sub(r"[^A-Za-z0-9._-]+", "-", checkpoint.path.parent.name).strip("-._") or "teacher"
    return (name if isinstance(name, str) and name else fallback)[:120]


def _location(source: str, checkpoint: Checkpoint | None = None) -> str:
    """The source, or a checkpoint of it, as it is registered: absolute, or hf:."""
    if not source.startswith("hf:"):
        return str(Path(source).absolute() if checkpoint is None else checkpoint.path.absolute())
    if checkpoint is None:
        return source
    return source.replace("{step}", str(checkpoint.step)).replace("{kstep}", str(checkpoint.step // 1000))
