"""Digests of weights by file and by tensor, and what equal ones at different steps tell.

The rule. A step of training changes nearly every weight: gradients are dense, and where one is zero weight decay and the moments
of Adam still move the matrix. So a file, or a matrix (a tensor of two or three dimensions in floating point: embeddings,
projections, experts), that is bitwise the same at two steps of one run was not trained between them: it is another step's, or it
was frozen. Both are reported, for only who trained the model knows which. Vectors do not count, for a norm's weights that are all
one stay so for the first steps of a run in 16 bits; nor do masks and tables of positions, which are integers, vectors, or of four
dimensions. Published trajectories break the rule: pythia-12b's steps 50000 and 58000 have the first shard of step 143000
(github.com/EleutherAI/pythia issue 206), 76 of pythia-2.8b's step branches are one file (issue 205).

Trust. A digest is one of bytes that were read. To read gigabytes at every start would cost minutes, so the digests of a published
file are kept on this machine in XDG_CACHE_HOME/megapd (default ~/.cache) under its path, and stand while its device, inode, size,
mtime and ctime do: whoever writes to a file moves its ctime, which nobody can set back. A file that changed less than
RACE_SECONDS before it was read is not kept, since a clock of the file system may not have ticked. What this cannot see is a disk
that returns other bytes than were written; so the bytes that are to teach are hashed when they are taken up (`check_files`), and
`verify` reads everything.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from megapd.errors import DiskFailed, UserError
from megapd.files import CACHE, machine_cache, write_atomic
from megapd.trajectory.pickles import load_pickle

log = logging.getLogger(__name__)

FORMAT = "megapd-digests/1"
CHUNK_BYTES = 1 << 20  # a whole number of values of every type
RACE_SECONDS = 2.0
NAMED = 3  # files or tensors that a message names

# Of 16 bits: where all bits of the exponent are set, the number is an infinity or none.
_EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80}
_FLOATS = {"F32": np.float32, "F64": np.float64}
_MATRIX_TYPES = {*_EXPONENTS, *_FLOATS, "F8_E4M3", "F8_E5M2"}

_known: dict[Path, tuple[list[int], FileDigests]] = {}
_told: set[str] = set()
_reading = threading.Lock()  # a file is read once a process


class FileDigests(NamedTuple):
    """sha256 of a file; of its matrices, by name, xxh3 of 128 bits; the tensors that hold NaN or an infinity."""

    sha256: str
    matrices: dict[str, str]
    not_finite: tuple[str, ...] = ()


Weights = Mapping[str, FileDigests]  # of a checkpoint: its files of weights by name


# --------------------------------------------------------------------------------------------------------------- reading


def read_digests(path: Path, *, pickles: bool = False) -> FileDigests:
    """Of all that the file holds now, read once. pickles: look into files that torch.save wrote too, which takes torch.

    Raises UserError for a .safetensors file whose header is none.
    """
    if path.suffix != ".safetensors":
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        return FileDigests(digest.hexdigest(), *(_pickled(path) if pickles else ({}, ())))
    digest, matrices, not_finite = hashlib.sha256(), {}, []
    with path.open("rb") as file:
        for name, kind, is_matrix, size in _segments(path):
            own = xxhash.xxh3_128()
            finite = True
            for start in range(0, size, CHUNK_BYTES):
                chunk = file.read(min(CHUNK_BYTES, size - start))
                digest.update(chunk)
                if is_matrix:
                    own.update(chunk)
                finite = finite and _finite(chunk, kind)
            if is_matrix:
                matrices[name] = own.hexdigest()
            if not finite:
                not_finite.append(name)
    return FileDigests(digest.hexdigest(), matrices, tuple(sorted(not_finite)))


def known_digests(path: Path) -> FileDigests:
    """As `read_digests` without pickles, from this machine's index where the file is as it was; see the module."""
    real = path.resolve()
    with _reading:
        stat, began = real.stat(), time.time()
        state = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        if real not in _known or _known[real][0] != state:
            entry = _index_file(real)
            found = _from_index(entry, real, state)
            if found is None:
                found = read_digests(path)
                if began - max(stat.st_mtime, stat.st_ctime) > RACE_SECONDS:
                    _to_index(entry, real, state, found)
            _known[real] = (state, found)
        return _known[real][1]


def safetensors_header(path: Path) -> tuple[int, dict[str, Any]]:
    """(where the tensors' bytes begin, name -> {"dtype", "shape", "data_offsets"}); UserError if there is none."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= path.stat().st_size - 8:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        found = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for entry in found.values():
            first, end = entry["data_offsets"]
            if not 0 <= first <= end <= path.stat().st_size - 8 - length or not isinstance(entry["shape"], list):
                raise ValueError("a tensor outside of the file")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged, no safetensors file ({error}); fetch or copy the checkpoint again") from error
    return 8 + length, found


def _segments(path: Path) -> Iterator[tuple[str, str, bool, int]]:
    """(name, dtype, whether it is a matrix, bytes) of the file's pieces in order; header and gaps have no name."""
    begin, tensors = safetensors_header(path)
    place = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        first, end = (begin + offset for offset in entry["data_offsets"])
        if first > place:
            yield "", "", False, first - place
        if first >= place:
            is_matrix = entry["dtype"] in _MATRIX_TYPES and len(entry["shape"]) in (2, 3) and end > first
            yield name, entry["dtype"], is_matrix, end - first
            place = end
    yield "", "", False, path.stat().st_size - place


def _finite(chunk: bytes, kind: str) -> bool:
    if kind in _FLOATS:
        return bool(np.isfinite(np.frombuffer(chunk, _FLOATS[kind])).all())
    if kind in _EXPONENTS:
        exponent = _EXPONENTS[kind]
        return not bool(((np.frombuffer(chunk, np.uint16) & exponent) == exponent).any())
    return True


def _pickled(path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    import torch

    matrices, not_finite = {}, []
    for name, tensor in load_pickle(path).items():
        if tensor.is_floating_point() and tensor.numel():
            if tensor.ndim in (2, 3):
                matrices[name] = xxhash.xxh3_128(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()
            if not bool(torch.isfinite(tensor).all()):
                not_finite.append(name)
    return matrices, tuple(sorted(not_finite))


# ----------------------------------------------------------------------------------------------------------------- index


def _index_file(real: Path) -> Path:
    return machine_cache("digests") / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json"


def _from_index(entry: Path, real: Path, state: list[int]) -> FileDigests | None:
    try:
        tree = json.loads(entry.read_bytes())
        if (tree["format"], tree["path"], tree["state"]) != (FORMAT, str(real), state):
            return None
        return FileDigests(str(tree["sha256"]), dict(tree["matrices"]), tuple(tree["not_finite"]))
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: the file itself is read again
        return None


def _to_index(entry: Path, real: Path, state: list[int], found: FileDigests) -> None:
    tree = {"format": FORMAT, "path": str(real), "state": state, **found._asdict()}
    try:
        write_atomic(entry, json.dumps(tree))
    except (DiskFailed, OSError) as error:
        text = f"{CACHE}: {entry.parent} cannot be written ({error}): published weights are hashed again at each start"
        if text not in _told:
            _told.add(text)
            log.warning(text)


# ------------------------------------------------------------------------------------------------------------- comparing


def equal_weights(where: object, weights: Mapping[int, Weights]) -> list[str]:
    """Problems, one line each, of the steps' files of weights: whole checkpoints, files, and matrices that several steps have."""
    problems, rest = [], dict(weights)
    for steps in _groups({step: ["".join(sorted(file.sha256 for file in files.values()))] for step, files in weights.items()}):
        name = ", ".join(f"{name} {file.sha256[:16]}" for name, file in sorted(weights[steps[0]].items())[:1])
        problems.append(f"{where}: steps {_list(steps)} have the same weights, {name}; {_FIX}")
        for step in steps[1:]:
            del rest[step]
    covered: dict[tuple[int, ...], set[str]] = {}
    for steps, shared in _groups({step: [file.sha256 for file in files.values()] for step, files in rest.items()}).items():
        files = [(name, file) for name, file in sorted(rest[steps[0]].items()) if file.sha256 in shared]
        covered[steps] = {matrix for _, file in files for matrix in file.matrices}
        names = ", ".join(f"{name} (sha256 {file.sha256[:16]})" for name, file in files[:NAMED])
        more = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
        problems.append(f"{where}: steps {_list(steps)} have the same {names}{more}; {_FIX}")
    matrices = {step: [f"{m[1]} {m[0]}" for f in files.values() for m in f.matrices.items()] for step, files in rest.items()}
    for steps, shared in _groups(matrices).items():
        elsewhere = {name for others, seen in covered.items() if set(steps) <= set(others) for name in seen}
        beside = sorted({key.partition(" ")[2] for key in shared} - elsewhere)
        if beside:
            share = f"{len(beside)} of {len(matrices[steps[0]])} matrices, {', '.join(beside[:NAMED])}"
            problems.append(f"{where}: steps {_list(steps)} have the same {share}; {_FIX}")
    return problems


def not_finite(where: object, step: int, weights: Weights) -> list[str]:
    """Problems, one line each: files of a checkpoint whose tensors hold NaN or an infinity."""
    fix = "leave the step out, or fetch the checkpoint again"
    return [
        f"{where}: step {step}: {', '.join(file.not_finite[:NAMED])} in {name} holds NaN or an infinity; {fix}"
        for name, file in sorted(weights.items())
        if file.not_finite
    ]


_FIX = "frozen in training, or of one step alone: leave out the others (teacher.steps), or fetch them again"


def _groups(keys: Mapping[int, Sequence[str]]) -> dict[tuple[int, ...], set[str]]:
    """Steps that share a key -> the keys that exactly those share."""
    steps: dict[str, list[int]] = defaultdict(list)
    for step, own in sorted(keys.items()):
        for key in set(own):
            steps[key].append(step)
    found: dict[tuple[int, ...], set[str]] = defaultdict(set)
    for key, having in steps.items():
        if len(having) > 1:
            found[tuple(having)].add(key)
    return dict(sorted(found.items()))


def _list(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))
