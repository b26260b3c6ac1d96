"""Read the checkpoints of a trajectory: which there are, waiting for one still to be written, and their weights verified.

On disk:

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
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from megapd.errors import RunFailed, UserError
from megapd.files import parse_finite, sha256_file
from megapd.trajectory.digests import FileDigests, equal_weights, not_finite, read_digests
from megapd.trajectory.measured import FILE as MEASURED
from megapd.trajectory.measured import as_metrics, read_measured

if TYPE_CHECKING:
    from torch import Tensor

    from megapd.slices import Part

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
    metrics     the teacher's latest metrics when it was written, and what `megapd analyse` has measured since
    files       name -> sha256 and size of each file beside meta.json
    forms       digests of further forms of its tokenizer: published models may have tokenizer.json and tokenizer.model
    """

    step: int
    path: Path
    digest: str
    vocabulary: str
    config: dict[str, Any] = field(repr=False)
    metrics: dict[str, Any] = field(repr=False)
    files: dict[str, File] = field(repr=False)
    forms: tuple[str, ...] = ()

    def speaks(self, vocabulary: str) -> bool:
        """Whether its ids are proved to mean what those of `vocabulary`, a digest, do."""
        return vocabulary in (self.vocabulary, *self.forms)

    @property
    def shards(self) -> list[str]:
        return sorted(name for name in self.files if is_shard(name))


def step_folder(step: int) -> str:
    return f"step_{step}"


def parse_step(folder_name: str) -> int | None:
    """The step that a folder's name stands for; None for temporaries and everything else."""
    match = _STEP.fullmatch(folder_name)
    return int(match[1]) if match else None


def is_shard(name: str) -> bool:
    return _SHARD.fullmatch(name) is not None


def weights_digest(files: Mapping[str, File]) -> str:
    """sha256 over the sorted "SHARD SHA256" lines; files that are no shards do not count."""
    lines = "".join(f"{name} {files[name].sha256}\n" for name in sorted(files) if is_shard(name))
    return hashlib.sha256(lines.encode()).hexdigest()


def named_runs(folder: Path) -> list[tuple[Path, str | None]]:
    """Of each checkpoint in `folder`: its meta.json, and the run that this says wrote it; None where it does not say."""
    found: list[tuple[Path, str | None]] = []
    for path in sorted(folder.glob(f"step_*/{META}")):
        try:
            found.append((path, json.loads(path.read_bytes()).get("run")))
        except (ValueError, AttributeError):  # damaged: whoever reads the checkpoint says so
            found.append((path, None))
    return found


def read_meta(path: Path) -> Checkpoint:
    """The checkpoint in folder `path`; UserError if its meta.json is missing, damaged or of another format."""
    meta = path / META
    try:
        tree = parse_finite(meta.read_bytes())
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
    kinds = {"step": int, "config": dict, "vocabulary": str, "metrics": dict, "files": dict, "digest": str}
    for key, kind in kinds.items():
        if type(tree[key]) is not kind:
            what = f"damaged, {key} is a {type(tree[key]).__name__}, not a {kind.__name__}"
            raise UserError(f"{meta}: {what}; restore the checkpoint")
    if tree["step"] != parse_step(path.name):
        raise UserError(
            f"{meta}: it is of step {tree['step']}, but its folder is {path.name}; rename it {step_folder(tree['step'])}"
        )
    try:
        files = {name: File(entry["sha256"], entry["bytes"]) for name, entry in tree["files"].items()}
        if outside := [name for name in files if Path(name).name != name]:
            raise UserError(f"{meta}: damaged, {outside[0]!r} is not the name of a file beside it; restore the checkpoint")
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{meta}: damaged, `files` does not give a sha256 and bytes for each; restore the checkpoint") from error
    metrics = tree["metrics"] | as_metrics(read_measured(path / MEASURED, tree["digest"]))
    checkpoint = Checkpoint(tree["step"], path, tree["digest"], tree["vocabulary"], tree["config"], metrics, files)
    if weights_digest(files) != checkpoint.digest or not checkpoint.shards:
        raise UserError(f"{meta}: damaged, digest {checkpoint.digest} is not that of the files listed; restore the checkpoint")
    return checkpoint


class CheckpointTimeout(RunFailed, TimeoutError):
    """A checkpoint that a teacher was to write did not appear in time."""


class Checkpoints(ABC):
    """What a teacher reads, wherever it is stored; as it was at construction or at the last `refresh`:

    steps        teacher steps of the complete checkpoints, increasing
    incomplete   steps of which there is something, but no whole checkpoint: a copy that stopped midway, or a file that was lost
    remote       whether to describe a checkpoint is a call over a network
    """

    remote = False

    def __init__(self) -> None:
        self.steps: tuple[int, ...] = ()
        self.incomplete: tuple[int, ...] = ()

    def notes(self, teachers: Sequence[int]) -> tuple[str, ...]:
        """What a user may not know of the trajectory, and of the steps of it that are to teach, one line each."""
        return ()

    @abstractmethod
    def refresh(self) -> tuple[int, ...]:
        """Look again which checkpoints there are; returns `steps`."""

    @abstractmethod
    def checkpoint(self, step: int) -> Checkpoint:
        """Everything but the weights; UserError if it is not there (the nearest are listed) or damaged."""

    def describe(self, step: int) -> Checkpoint:
        """As `checkpoint`, but where that takes reading the weights, without their digest: it is empty then, and so is files."""
        return self.checkpoint(step)

    @abstractmethod
    def written(self, step: int) -> bool:
        """Whether the checkpoint of `step` is there now, whole."""

    def wait_for(self, step: int, timeout_seconds: float, poll_seconds: float = 0.2) -> Checkpoint:
        """The checkpoint of `step` as soon as it is whole; CheckpointTimeout if it is not after `timeout_seconds`."""
        deadline = time.monotonic() + timeout_seconds
        while not self.written(step):
            left = deadline - time.monotonic()
            if left <= 0:
                raise CheckpointTimeout(self._late(f"no checkpoint of step {step} after {timeout_seconds:g} s"))
            time.sleep(min(poll_seconds, left))
        return self.checkpoint(step)

    @abstractmethod
    def _late(self, what: str) -> str:
        """The message of a CheckpointTimeout: where, `what`, and what to do."""

    def _list(self, found: Iterable[int]) -> None:
        """Divide the steps of which there is something, increasing, into those that are whole and the others."""
        whole = {step: self.written(step) for step in found}
        self.steps = tuple(step for step, complete in whole.items() if complete)
        self.incomplete = tuple(step for step, complete in whole.items() if not complete)

    def _nearest(self, step: int) -> str:
        """What there is around `step`, looked up again."""
        nearest = nearest_steps(self.refresh(), step)
        return f"the nearest are {', '.join(map(str, nearest))}" if nearest else "there are none"

    def _newest(self) -> str:
        steps = self.refresh()
        return f"the newest there is of step {steps[-1]}" if steps else "there is none yet"


class Trajectory(Checkpoints):
    """The checkpoints in one folder.

    `checkpoint`, `load` and `wait_for` look at the disk. `incomplete`: folders without
    meta.json, copies that stopped midway, since checkpoints are renamed into place whole.
    """

    def __init__(self, folder: Path, *, must_exist: bool = True) -> None:
        """Raises UserError if there is no checkpoint in `folder`; must_exist=False allows that: the teacher has just begun."""
        super().__init__()
        self.folder = Path(folder)
        self.refresh()
        if must_exist and not self.steps:
            incomplete = f" ({len(self.incomplete)} without {META})" if self.incomplete else ""
            found = f"no complete checkpoint in {folder}{incomplete}" if self.folder.is_dir() else f"no folder {folder}"
            fix = "name the trajectory folder of a teacher run, runs/NAME/trajectory"
            if any((self.folder / step_folder(step) / "config.json").is_file() for step in self.incomplete):
                fix = f"transformers' checkpoints are named {folder}/step_{{step}}"
            raise UserError(f"teacher.trajectory: {found}; {fix}")

    def refresh(self) -> tuple[int, ...]:
        names = [entry.name for entry in self.folder.iterdir()] if self.folder.is_dir() else []
        self._list(sorted(step for step in map(parse_step, names) if step is not None))
        return self.steps

    def checkpoint(self, step: int) -> Checkpoint:
        if not (self.folder / step_folder(step)).is_dir():
            fix = f"{self._nearest(step)}: change the schedule, or train the teacher further"
            raise UserError(f"{self.folder}: no checkpoint of step {step}; {fix}")
        return read_meta(self.folder / step_folder(step))

    def load(self, step: int) -> dict[str, Tensor]:
        """All tensors of a checkpoint on the host, after the size and sha256 of every file were found right; UserError if not."""
        return dict(self.tensors(step))

    def tensors(self, step: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors one at a time, shard by shard, each file verified first: O(one tensor) of memory. Raises as `load` does."""
        checkpoint = self.checkpoint(step)
        check_files(checkpoint)
        for shard in checkpoint.shards:
            with safe_open(checkpoint.path / shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    yield name, file.get_tensor(name)

    def read(self, step: int, wanted: Mapping[str, Part]) -> dict[str, Tensor]:
        """The parts of tensors that `wanted` names, on the host; of the rest of the files nothing is read, nor verified.

        Raises UserError unless the checkpoint holds exactly the tensors that are named, in shapes that have those parts.
        """
        from megapd.slices import take  # imports torch, which listing checkpoints does without

        checkpoint = self.checkpoint(step)
        found: dict[str, Tensor] = {}
        stored: set[str] = set()
        for shard in checkpoint.shards:
            with safe_open(checkpoint.path / shard, framework="pt") as file:
                names = set(file.keys())
                stored |= names
                for name in names & wanted.keys():
                    found[name] = take(file.get_slice(name), wanted[name])
        if stored != wanted.keys():
            odd = sorted(stored ^ wanted.keys())[:3]
            raise UserError(f"{checkpoint.path}: its tensors are not those of the model in its meta.json, e.g. {', '.join(odd)}")
        return found

    def verify(self) -> list[str]:
        """Problems, one line each: incomplete or damaged checkpoints, files that changed, weights that are not finite, and those
        that are equal at different steps (digests.py)."""
        self.refresh()
        problems = [
            f"{self.folder / step_folder(step)}: it has no {META}, so it is no complete checkpoint" for step in self.incomplete
        ]
        weights: dict[int, dict[str, FileDigests]] = {}
        for step in self.steps:
            try:
                weights[step] = _verified(self.checkpoint(step))
                problems += not_finite(self.folder / step_folder(step), step, weights[step])
            except UserError as error:
                problems.append(str(error))
        return problems + equal_weights(self.folder, weights)

    def written(self, step: int) -> bool:
        return (self.folder / step_folder(step) / META).is_file()

    def _late(self, what: str) -> str:
        fix = "is the teacher running, and does its trajectory.every write this step?"
        return f"{self.folder}: {what}; {self._newest()}; {fix}"


def check_files(checkpoint: Checkpoint, share: int = 0, of: int = 1, hash_file: Callable[[Path], str] = sha256_file) -> None:
    """UserError unless every file that the checkpoint lists is there with its size and sha256.

    share, of: check this one of `of` parts of the files, so that ranks can divide the work. hash_file: gives a file's sha256.
    """
    for name, expected in sorted(checkpoint.files.items())[share::of]:
        path = checkpoint.path / name
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise UserError(f"{path}: missing; restore the checkpoint") from error
        if size != expected.bytes:
            raise UserError(f"{path}: {size} bytes, but {expected.bytes} were written; restore the checkpoint")
        found = hash_file(path)
        if found != expected.sha256:
            raise UserError(f"{path}: its sha256 is {found}, but {expected.sha256} was written; restore the checkpoint")


def _verified(checkpoint: Checkpoint) -> dict[str, FileDigests]:
    """Of its files of weights, each read and found as `check_files` asks."""
    found: dict[str, FileDigests] = {}

    def hash_file(path: Path) -> str:
        found[path.name] = read_digests(path)
        return found[path.name].sha256

    check_files(checkpoint, hash_file=hash_file)
    return {name: found[name] for name in checkpoint.shards}


def nearest_steps(steps: tuple[int, ...], step: int, count: int = 4) -> tuple[int, ...]:
    """Up to `count` of the increasing `steps` around `step`, increasing."""
    place = bisect_left(steps, step)
    around = steps[max(0, place - count) : place + count]
    return tuple(sorted(sorted(around, key=lambda s: (abs(s - step), s))[:count]))
