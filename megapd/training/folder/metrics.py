"""metrics.jsonl: one JSON object a line, `kind` and `step` first; the first line names the run."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from megapd.files import append_whole, check_run, write_atomic, writing

METRICS = "metrics.jsonl"  # in the run's folder
log = logging.getLogger(__name__)


class MetricsFile:
    """The run's own log. Numbers that are not finite become null."""

    def __init__(self, folder: Path, run: str, step: int, every: int, known: tuple[int, str] = (-1, "")) -> None:
        """Keeps the lines up to the step that the run resumes at: a killed run wrote further than its checkpoint.

        step: where it resumes. every: steps between lines of kind train, at the most. known: a step, and the digest of lines up
        to it. A damaged file is kept beside; lines that it lacks, or has otherwise, are told. Raises UserError for another run's.
        """
        path = folder / METRICS
        content = path.read_bytes() if path.exists() else b""
        lines, damaged = _parse(content)
        if damaged:
            aside = _aside(path)
            write_atomic(aside, content)
            log.warning("%s: line %d is damaged, its good lines are kept; the file as it was: %s", path, damaged[0], aside.name)
        self.kept = _until(lines, step)
        if self.kept and self.kept[0]["kind"] == "run":
            check_run(path, self.kept[0].get("id"), run)
        else:
            self.kept.insert(0, {"kind": "run", "step": 0, "id": run})
        _tell_gap(path, self.kept, step, every)
        if known[0] <= step and not damaged:
            _tell_changed(path, self.kept, *known)
        whole = _bytes(self.kept)
        self._hash = hashlib.sha256(whole)
        write_atomic(path, whole)
        self._path, self._file = path, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    @property
    def digest(self) -> str:
        """Of all lines: sha256, hexadecimal."""
        return self._hash.hexdigest()

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = json.dumps({"kind": kind, "step": step, **clean}).encode() + b"\n"
        append_whole(self._path, self._file, line)
        self._hash.update(line)

    def sync(self) -> None:
        with writing(self._path):
            os.fsync(self._file)

    def close(self) -> None:
        try:
            self.sync()
        finally:
            os.close(self._file)


def branch_lines(source: Path, target: Path, run: str, step: int) -> str:
    """Write the lines of `source` up to `step` as those of another run; their digest."""
    lines = [line for line in recorded(source, step) if line["kind"] != "run"]
    whole = _bytes([{"kind": "run", "step": 0, "id": run}, *lines])
    write_atomic(target, whole)
    return hashlib.sha256(whole).hexdigest()


def tell_changed(path: Path, step: int, digest: str) -> None:
    """Warn if the lines of metrics.jsonl up to `step` are not those that had `digest`; "": it is not known."""
    _tell_changed(path, recorded(path, step), step, digest)


def changed_lines(path: Path, step: int, digest: str) -> bool:
    """Whether `tell_changed` would warn."""
    return _differ(recorded(path, step), step, digest)


def recorded(path: Path, step: int) -> list[dict[str, Any]]:
    """The good lines of metrics.jsonl that belong to the first `step` student steps."""
    return _until(_parse(path.read_bytes())[0], step) if path.exists() else []


def named_run(path: Path) -> str | None:
    """The run that metrics.jsonl says it is of, None where it does not say."""
    first = next(iter(recorded(path, 0)), {})
    return first.get("id") if first.get("kind") == "run" else None


def numbers(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """What is a number in a line of metrics, as kind/name."""
    return {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}


def _parse(content: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """The good lines, and the numbers of the others; a last line without its end, as a kill leaves it, is neither."""
    *lines, _ = content.split(b"\n")
    records = [_record(line) for line in lines]
    return [record for record in records if record], [number for number, record in enumerate(records, start=1) if not record]


def _record(line: bytes) -> dict[str, Any]:
    """The line's record, {} if it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    whole = isinstance(record, dict) and isinstance(record.get("kind"), str) and type(record.get("step")) is int
    return record if whole else {}


def _until(records: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    # A rotation is written when its step begins, the others when their step is done.
    return [record for record in records if record["step"] < step + (record["kind"] != "rotation")]


def _aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return aside


def _tell_changed(path: Path, lines: list[dict[str, Any]], step: int, digest: str) -> None:
    if _differ(lines, step, digest):
        log.warning("%s: its lines up to step %d are not those that the run wrote", path, step)


def _differ(lines: list[dict[str, Any]], step: int, digest: str) -> bool:
    return bool(digest) and hashlib.sha256(_bytes(_until(lines, step))).hexdigest() != digest


def _bytes(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _tell_gap(path: Path, lines: list[dict[str, Any]], step: int, every: int) -> None:
    steps = [0, *sorted({line["step"] for line in lines if line["kind"] == "train"})]
    for before, after in pairwise([*steps, step + 1]):
        if after - before > every and before < step:
            log.warning("%s: it lacks lines of steps %d to %d; they are lost, the run is not", path, before + 1, after - 1)
            return
