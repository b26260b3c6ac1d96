"""Read the checkpoints of a trajectory: which there are, and their weights verified."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from safetensors import safe_open

from megapd.errors import UserError
from megapd.files import sha256_file
from megapd.trajectory.format import META, Checkpoint, parse_step, read_meta, step_folder
from megapd.trajectory.listing import Listing, equal_weights

if TYPE_CHECKING:
    from torch import Tensor

    from megapd.slices import Part


class Checkpoints(Protocol):
    """What a teacher reads: trajectory.Trajectory, or the same interface over other stores."""

    @property
    def steps(self) -> tuple[int, ...]: ...

    @property
    def incomplete(self) -> tuple[int, ...]: ...

    def refresh(self) -> tuple[int, ...]: ...

    def checkpoint(self, step: int) -> Checkpoint: ...

    def written(self, step: int) -> bool: ...

    def wait_for(self, step: int, timeout_seconds: float) -> Checkpoint: ...


class Trajectory(Listing):
    """The checkpoints in one folder.

    `steps` is what was there at construction or at the last `refresh`; `checkpoint`, `load` and `wait_for` look at the disk.
    `incomplete`: folders without meta.json, copies that stopped midway, since checkpoints are renamed into place whole.
    """

    def __init__(self, folder: Path, *, must_exist: bool = True) -> None:
        """Raises UserError if there is no checkpoint in `folder`; must_exist=False allows that: the teacher has just begun."""
        super().__init__()
        self.folder = Path(folder)
        self.refresh()
        if must_exist and not self._steps:
            raise UserError(
                f"teacher.trajectory: {self._emptiness()}; name the trajectory folder of a teacher run, runs/NAME/trajectory"
            )

    def refresh(self) -> tuple[int, ...]:
        """Look again which checkpoints there are; returns `steps`."""
        names = [entry.name for entry in self.folder.iterdir()] if self.folder.is_dir() else []
        self._list(sorted(step for step in map(parse_step, names) if step is not None))
        return self._steps

    def checkpoint(self, step: int) -> Checkpoint:
        """Everything but the weights; UserError if it is not there (the nearest are listed) or its meta.json is damaged."""
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
            f"{self.folder / step_folder(step)}: it has no {META}, so it is no complete checkpoint" for step in self._incomplete
        ]
        same: dict[str, list[int]] = defaultdict(list)
        for step in self._steps:
            try:
                checkpoint = self.checkpoint(step)
                same[checkpoint.digest].append(step)
                check_files(checkpoint)
            except UserError as error:
                problems.append(str(error))
        return problems + equal_weights(self.folder, same)

    def written(self, step: int) -> bool:
        """Whether the checkpoint of `step` is there now, whole."""
        return (self.folder / step_folder(step) / META).is_file()

    def _late(self, what: str) -> str:
        fix = "is the teacher running, and does its trajectory.every write this step?"
        return f"{self.folder}: {what}; {self._newest()}; {fix}"

    def _emptiness(self) -> str:
        if not self.folder.is_dir():
            return f"no folder {self.folder}"
        incomplete = f" ({len(self._incomplete)} without {META})" if self._incomplete else ""
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
