"""Read the checkpoints of a trajectory: which there are, waiting for one still to be written, and their weights verified."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from megapd.errors import RunFailed, UserError
from megapd.files import sha256_file
from megapd.trajectory.format import META, Checkpoint, parse_step, read_meta, step_folder

if TYPE_CHECKING:
    from torch import Tensor

    from megapd.slices import Part


class CheckpointTimeout(RunFailed, TimeoutError):
    """A checkpoint that a teacher was to write did not appear in time."""


class Checkpoints(ABC):
    """What a teacher reads, wherever it is stored; as it was at construction or at the last `refresh`:

    steps        teacher steps of the complete checkpoints, increasing
    incomplete   steps of which there is something, but no whole checkpoint: a copy that stopped midway, or a file that was lost
    """

    def __init__(self) -> None:
        self.steps: tuple[int, ...] = ()
        self.incomplete: tuple[int, ...] = ()

    @abstractmethod
    def refresh(self) -> tuple[int, ...]:
        """Look again which checkpoints there are; returns `steps`."""

    @abstractmethod
    def checkpoint(self, step: int) -> Checkpoint:
        """Everything but the weights; UserError if it is not there (the nearest are listed) or damaged."""

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
            raise UserError(
                f"teacher.trajectory: {self._emptiness()}; name the trajectory folder of a teacher run, runs/NAME/trajectory"
            )

    def refresh(self) -> tuple[int, ...]:
        names = [entry.name for entry in self.folder.iterdir()] if self.folder.is_dir() else []
        self._list(sorted(step for step in map(parse_step, names) if step is not None))
        return self.steps

    def checkpoint(self, step: int) -> Checkpoint:
        if not (self.folder / step_folder(step)).is_dir():
            raise UserError(
                f"{self.folder}: no checkpoint of step {step}; {self._nearest(step)}: "
                f"change the schedule, or train the teacher further"
            )
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
        """Problems, one line each: incomplete or damaged checkpoints, files that changed, equal weights at different steps."""
        self.refresh()
        problems = [
            f"{self.folder / step_folder(step)}: it has no {META}, so it is no complete checkpoint" for step in self.incomplete
        ]
        same: dict[str, list[int]] = defaultdict(list)
        for step in self.steps:
            try:
                checkpoint = self.checkpoint(step)
                same[checkpoint.digest].append(step)
                check_files(checkpoint)
            except UserError as error:
                problems.append(str(error))
        return problems + equal_weights(self.folder, same)

    def written(self, step: int) -> bool:
        return (self.folder / step_folder(step) / META).is_file()

    def _late(self, what: str) -> str:
        fix = "is the teacher running, and does its trajectory.every write this step?"
        return f"{self.folder}: {what}; {self._newest()}; {fix}"

    def _emptiness(self) -> str:
        if not self.folder.is_dir():
            return f"no folder {self.folder}"
        incomplete = f" ({len(self.incomplete)} without {META})" if self.incomplete else ""
        return f"no complete checkpoint in {self.folder}{incomplete}"


def check_files(checkpoint: Checkpoint, share: int = 0, of: int = 1) -> None:
    """UserError unless every file that the checkpoint lists is there with its size and sha256.

    share, of: check this one of `of` parts of the files, so that ranks can divide the work.
    """
    for name, expected in sorted(checkpoint.files.items())[share::of]:
        path = checkpoint.path / name
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise UserError(f"{path}: missing; restore the checkpoint") from error
        if size != expected.bytes:
            raise UserError(f"{path}: {size} bytes, but {expected.bytes} were written; restore the checkpoint")
        found = sha256_file(path)
        if found != expected.sha256:
            raise UserError(f"{path}: its sha256 is {found}, but {expected.sha256} was written; restore the checkpoint")


def equal_weights(where: object, same: Mapping[str, Sequence[int]]) -> list[str]:
    """Problems, one line each, from digest -> steps: weights that several steps have."""
    return [
        f"{where}: steps {', '.join(map(str, steps))} have the same weights, digest {digest[:12]}"
        for digest, steps in same.items()
        if len(steps) > 1
    ]


def nearest_steps(steps: tuple[int, ...], step: int, count: int = 4) -> tuple[int, ...]:
    """Up to `count` of the increasing `steps` around `step`, increasing."""
    place = bisect_left(steps, step)
    around = steps[max(0, place - count) : place + count]
    return tuple(sorted(sorted(around, key=lambda s: (abs(s - step), s))[:count]))
