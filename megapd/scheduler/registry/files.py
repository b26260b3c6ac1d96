"""The files' side of the registry: import a trajectory, watch one that grows, and hash one again.

    registry = LocalRegistry(store) or RemoteRegistry(config.scheduler)
    import_trajectory(registry, "runs/teacher", name="teacher")
    verify_trajectory(registry, "teacher")

Only this reads checkpoints' files, on the machine that has them; the service keeps what it is told.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

import torch
from safetensors import safe_open

from megapd.config import SchedulerConfig
from megapd.errors import UserError
from megapd.files import sha256_file
from megapd.scheduler.client.http import Api, told
from megapd.scheduler.registry.verify import Flags, judge
from megapd.scheduler.store import trajectories as catalogue
from megapd.scheduler.store.database import Store, StoreError
from megapd.trajectory import Checkpoint, Trajectory
from megapd.trajectory.hugging_face import HuggingFaceTrajectory, is_hugging_face

log = logging.getLogger(__name__)


PAGE = 1000


HASH_ROWS = 4096  # of the head's weight at once


RETRY_SECONDS = 60.0


# Weights of output layers, and of the embeddings that stand in for one that is tied, as megapd and published models call them.
_HEADS = re.compile(r"(^|\.)(head|lm_head|embed_out|cls\.predictions\.decoder)\.weight$")


_EMBEDDINGS = re.compile(r"(^|\.)(tokens|wte|word_embeddings|embed_tokens|embed_in|shared)\.weight$")


Probe = Callable[[Any, Checkpoint], float]  # (trajectory, checkpoint) -> loss on a sample that is the same for all checkpoints


class Files(Protocol):
    """Trajectory or HuggingFaceTrajectory."""

    @property
    def steps(self) -> tuple[int, ...]: ...

    def refresh(self) -> tuple[int, ...]: ...

    def checkpoint(self, step: int) -> Checkpoint: ...


class Registry(Protocol):
    """Where records go. Raises UserError for what is refused there."""

    def add_trajectory(self, run: str, location: str, vocabulary: str, name: str | None) -> str: ...

    def add_checkpoint(self, trajectory: str, record: dict[str, Any]) -> bool: ...

    def find_trajectory(self, reference: str) -> dict[str, Any]: ...

    def checkpoints(self, trajectory: str) -> list[dict[str, Any]]: ...

    def set_flags(self, trajectory: str, flags: Flags) -> list[dict[str, Any]]: ...

    def accept(self, checkpoint: str) -> None: ...


class LocalRegistry:
    """The store itself, on this machine."""

    def __init__(self, store: Store, author: str = "command line") -> None:
        self._store, self._author = store, author

    def add_trajectory(self, run: str, location: str, vocabulary: str, name: str | None) -> str:
        def write(connection: Any) -> str:
            digest = catalogue.add_trajectory(connection, run, location, vocabulary)[0]["digest"]
            if name is not None:
                catalogue.set_name(connection, name, digest)
            return digest

        return self._told(self._store.write, write)

    def add_checkpoint(self, trajectory: str, record: dict[str, Any]) -> bool:
        return self._told(self._store.write, lambda connection: catalogue.add_checkpoint(connection, trajectory, record)[1])

    def find_trajectory(self, reference: str) -> dict[str, Any]:
        return self._told(self._store.read, lambda connection: catalogue.find_trajectory(connection, reference))

    def checkpoints(self, trajectory: str) -> list[dict[str, Any]]:
        return self._store.read(lambda connection: catalogue.list_checkpoints(connection, trajectory))

    def set_flags(self, trajectory: str, flags: Flags) -> list[dict[str, Any]]:
        return self._told(self._store.write, lambda connection: catalogue.set_flags(connection, trajectory, flags))

    def accept(self, checkpoint: str) -> None:
        self._told(self._store.write, lambda connection: catalogue.accept(connection, checkpoint, self._author))

    @staticmethod
    def _told(call: Callable[[Any], Any], do: Callable[[Any], Any]) -> Any:
        try:
            return call(do)
        except StoreError as error:
            raise UserError(str(error)) from error


class RemoteRegistry:
    """The service's API. Calls are repeated for a minute while it is away."""

    def __init__(self, settings: SchedulerConfig) -> None:
        self._api = Api(settings, retry_seconds=RETRY_SECONDS)

    def add_trajectory(self, run: str, location: str, vocabulary: str, name: str | None) -> str:
        body = {"run": run, "location": location, "vocabulary": vocabulary, "name": name}
        return self._ask("POST", "/v1/trajectories", body)["digest"]

    def add_checkpoint(self, trajectory: str, record: dict[str, Any]) -> bool:
        body = {key: value for key, value in record.items() if key != "bytes"}  # the service adds it up
        return told(lambda: self._api.answer("POST", f"/v1/trajectories/{trajectory}/checkpoints", body))[0] == 201

    def find_trajectory(self, reference: str) -> dict[str, Any]:
        return self._ask("GET", f"/v1/trajectories/{quote(reference, safe='')}")

    def checkpoints(self, trajectory: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            after = found[-1]["step"] if found else -1
            page = self._ask("GET", f"/v1/trajectories/{trajectory}/checkpoints?after={after}&limit={PAGE}")
            found += page
            if len(page) < PAGE:
                return found

    def set_flags(self, trajectory: str, flags: Flags) -> list[dict[str, Any]]:
        body = {"flags": {str(step): kinds for step, kinds in flags.items()}}
        return self._ask("PUT", f"/v1/trajectories/{trajectory}/flags", body)

    def accept(self, checkpoint: str) -> None:
        self._ask("POST", f"/v1/checkpoints/{checkpoint}/accept")

    def close(self) -> None:
        self._api.close()

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        return told(lambda: self._api.ask(method, path, body))


# ---------------------------------------------------------------------------------------------------------------- import


class Imported(NamedTuple):
    """digest of the trajectory; steps that were new, steps that it had already."""

    digest: str
    added: tuple[int, ...]
    known: tuple[int, ...]


def open_files(source: str, steps: tuple[int, ...] = (), *, must_exist: bool = True) -> Files:
    """The checkpoints that a folder (a trajectory's or its run's), a pattern or hf:REPO stands for. UserError if there are
    none."""
    if is_hugging_face(source):
        return HuggingFaceTrajectory(source, steps)
    folder = Path(source)
    return Trajectory(folder / "trajectory" if (folder / "trajectory").is_dir() else folder, must_exist=must_exist)


def import_trajectory(
    registry: Registry, source: str, *, steps: tuple[int, ...] = (), name: str | None = None, probe: Probe | None = None
) -> Imported:
    """Register what is there. Twice does the same as once; what was added to the files since is added.

    The files' sha256 are those that the checkpoint's writer recorded, or, of published ones, those that they have now; `verify`
    compares them. Raises UserError, naming the step, where a checkpoint that is registered has become another one.
    """
    files = open_files(source, steps)
    if not files.steps:
        raise UserError(f"{source}: no complete checkpoint")
    first = files.checkpoint(files.steps[0])
    digest = registry.add_trajectory(_run_of(first), _location(source), first.vocabulary, name)
    return Imported(digest, *_register(registry, digest, files, source, probe, stop=None))


def watch_trajectory(
    registry: Registry,
    source: str,
    stop: threading.Event,
    *,
    poll_seconds: float = 5.0,
    name: str | None = None,
    probe: Probe | None = None,
    told: Callable[[int], None] = lambda step: None,
) -> str | None:
    """Register the checkpoints of a teacher that trains, each as it appears, until `stop`; the trajectory's digest, None before
    any.

    told: called with each new step. The rules that need no hashing are looked at whenever something is new.
    """
    digest = None
    while True:
        files = open_files(source, must_exist=False)
        if files.steps:
            if digest is None:
                first = files.checkpoint(files.steps[0])
                digest = registry.add_trajectory(_run_of(first), _location(source), first.vocabulary, name)
            added, _ = _register(registry, digest, files, source, probe, stop)
            if added:
                changed = {
                    r["step"]: f["detail"] for r in registry.checkpoints(digest) for f in r["flags"] if f["kind"] == "changed"
                }
                found = judge(registry.checkpoints(digest))
                for step, detail in changed.items():
                    found.setdefault(step, {})["changed"] = detail
                registry.set_flags(digest, found)
            for step in added:
                told(step)
        if stop.wait(poll_seconds):
            return digest


def _register(
    registry: Registry, digest: str, files: Files, source: str, probe: Probe | None, stop: threading.Event | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    known = {record["step"]: record for record in registry.checkpoints(digest)}
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
        registry.add_checkpoint(digest, record)
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
        "bytes": sum(file.bytes for file in checkpoint.files.values()),
        "metrics": checkpoint.metrics,
        "probe_loss": probe_loss,
    }


def head_digest(checkpoint: Checkpoint) -> str | None:
    """sha256 over "DTYPE SHAPE\\n" and the bytes of the output layer's weight; None where it is not found, as in pickled files.

    It is equal for equal weights however the file around them is laid out, which the file's own sha256 is not.
    """
    found: dict[bool, tuple[Path, str]] = {}
    for name in sorted(checkpoint.files):
        if not name.endswith(".safetensors"):
            continue
        with safe_open(checkpoint.path / name, framework="pt") as file:
            for tensor in sorted(file.keys()):
                for is_head, expression in ((True, _HEADS), (False, _EMBEDDINGS)):
                    if expression.search(tensor):
                        found.setdefault(is_head, (checkpoint.path / name, tensor))
    if not found:
        return None
    path, tensor = found.get(True) or found[False]
    with safe_open(path, framework="pt") as file:
        part = file.get_slice(tensor)
        shape = part.get_shape()
        hashed = hashlib.sha256(f"{part.get_dtype()} {shape}\n".encode())
        for rows in _rows(shape[0]):
            block = part[rows].contiguous()
            hashed.update(block.reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def _rows(count: int) -> Iterator[slice]:
    for start in range(0, count, HASH_ROWS):
        yield slice(start, min(count, start + HASH_ROWS))


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


# ---------------------------------------------------------------------------------------------------------------- verify


def verify_trajectory(registry: Registry, reference: str, *, accept: bool = False) -> list[dict[str, Any]]:
    """Hash every file again, judge the records (verify.py), and flag what is wrong; the flagged checkpoints.

    accept: let those be scheduled all the same. Raises UserError if no checkpoint's folder is on this machine.
    """
    digest = registry.find_trajectory(reference)["digest"]
    records = registry.checkpoints(digest)
    if not records:
        raise UserError(f"{reference}: no checkpoint is registered; import them first")
    if not any(_folder(record) is not None for record in records):
        raise UserError(f"{records[0]['location']}: not on this machine; verify where the files are")
    flags = judge(records)
    for record in records:
        detail = changed(record)
        if detail is not None:
            flags.setdefault(record["step"], {})["changed"] = detail
    flagged = registry.set_flags(digest, flags)
    if accept:
        for checkpoint in flagged:
            registry.accept(checkpoint["digest"])
        flagged = [record for record in registry.checkpoints(digest) if record["flags"]]
    return flagged


def changed(record: Mapping[str, Any]) -> str | None:
    """How the files are not those of the record; None if they are. Reads all of them."""
    folder = _folder(record)
    if folder is None:
        return "its folder is missing"
    for name, file in sorted(record["files"].items()):
        path = folder / name
        try:
            size = path.stat().st_size
            if size != file["bytes"]:
                return f"{name} has {size} bytes, registered were {file['bytes']}"
            found = sha256_file(path)
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        if found != file["sha256"]:
            return f"{name} has sha256 {found[:12]}, registered was {file['sha256'][:12]}"
    return None


def _folder(record: Mapping[str, Any]) -> Path | None:
    location = record["location"]
    if location.startswith("hf:"):
        return HuggingFaceTrajectory(location, (record["step"],)).checkpoint(record["step"]).path
    return Path(location) if Path(location).is_dir() else None
