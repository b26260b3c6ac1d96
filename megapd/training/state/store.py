"""Resumable checkpoints: atomic, verified, the last few kept.

    checkpoints/.step_N.writing/   every rank writes its share here, hashes and syncs it
    checkpoints/step_N/            the same folder, renamed once manifest.json (names, sizes, sha256) is in it

A folder step_N is therefore always whole when its rename reached the disk; damage that came later shows in the manifest. See
files.py for what lies in it. Those of an older megapd are DeepSpeed's own, and are read on the ranks and at the stage that wrote
them.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from megapd.errors import UserError
from megapd.files import check_run, fsync_path, obey_umask, sealed, sha256_file, unsealed, write_atomic, writing
from megapd.training.engine import Engine
from megapd.training.state.files import holds_state, read_state, write_state
from megapd.world import World

MANIFEST = "manifest.json"
FREE = ("ranks", "training.zero_stage", "training.precision")  # of the layout: what may change; settings are held to run.json
log = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run's folder. Every method is collective: all ranks call it together."""

    def __init__(self, folder: Path, world: World, keep: int, data: str, run: str, *, adopted: bool = False) -> None:
        """keep: how many whole ones stay. data: digest of what the task reads, which a resumed run must find again. run: the id
        that each names. adopted: those of an older megapd, which name none, are the run's too."""
        self.folder, self.world, self.keep, self.data = folder, world, keep, data
        self.run, self.adopted = run, adopted

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(int(path.name.removeprefix("step_")) for path in self.folder.glob("step_*") if path.name[5:].isdigit())

    def save(self, engine: Engine, step: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint of `step` student steps; when it returns, the checkpoint is on disk; else DiskFailed."""
        temporary, final = self.folder / f".step_{step}.writing", self.folder / f"step_{step}"
        try:
            with writing(final):
                self._save(engine, step, state, temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return final

    def _save(self, engine: Engine, step: int, state: dict[str, Any], temporary: Path, final: Path) -> None:
        if self.world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob(".step_*"):
                shutil.rmtree(left_over)
        self.world.barrier()
        temporary.mkdir(exist_ok=True)
        write_state(temporary, engine.deepspeed, engine.learner, self.world, {"step": step, **state})
        seen = self.world.gather([p.relative_to(temporary).as_posix() for p in temporary.rglob("*") if p.is_file()])
        entries = self._over_files(temporary, sorted(set().union(*seen)), sync=True)
        if self.world.rank == 0:
            manifest = {"step": step, "run": self.run, "layout": self._layout(engine), "files": entries}
            write_atomic(temporary / MANIFEST, sealed(manifest))
            obey_umask(temporary)
            for folder in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
                fsync_path(folder)
            if final.exists():  # a resumed run that came by again after a fallback
                shutil.rmtree(final)
            temporary.rename(final)
            fsync_path(self.folder)
            for old in [kept for kept in self.steps() if kept <= step][: -self.keep]:
                shutil.rmtree(self.folder / f"step_{old}")
        self.world.barrier()

    def restore(self, engine: Engine) -> dict[str, Any] | None:
        """Load the newest checkpoint that is whole, see `newest`, and set damaged ones aside; None if there is none to load.

        Raises UserError if it was written with another training.deepspeed, or by an older megapd on other ranks.
        """
        found = self.newest()
        if found is None:
            return None
        self._set_aside([later for later in self.world.gather(self.steps())[0] if later > found[0]])
        return self.load(engine, found[1])

    def newest(self) -> tuple[int, Path] | None:
        """Student steps and folder of the newest checkpoint that is whole; None if there is none. Changes nothing.

        A damaged one is reported and the one before is looked at. Raises UserError if all are damaged, or if the newest whole one
        is another run's or of other data.
        """
        steps: list[int] = self.world.gather(self.steps())[0]  # a shared folder's listing may lag on other nodes
        for step in reversed(steps):
            folder = self.folder / f"step_{step}"
            problem = self._problem(folder)
            if problem is not None:
                if self.world.rank == 0:
                    log.warning("checkpoint %s is damaged (%s); falling back to the one before", folder, problem)
                continue
            manifest = unsealed((folder / MANIFEST).read_text())
            if not (self.adopted and "run" not in manifest):
                check_run(folder, manifest.get("run", "of no name"), self.run)
            if manifest["layout"]["task's data"] != self.data:
                raise UserError(f"{folder} was written with other data than task.corpus has now; restore the corpus")
            return step, folder
        if steps:
            raise UserError(
                f"{self.folder}: all of its {len(steps)} checkpoints are damaged; move the folder away to start again"
            )
        return None

    def problem(self, step: int) -> str | None:
        """What is wrong with the checkpoint of `step`, None if it is whole."""
        return self._problem(self.folder / f"step_{step}")

    def load(self, engine: Engine, folder: Path) -> dict[str, Any]:
        """Give the engine the state of a whole checkpoint; what the run carried in it. UserError as `restore`."""
        former, now = not holds_state(folder), self._layout(engine)
        for key, value in unsealed((folder / MANIFEST).read_text())["layout"].items():
            if now.get(key) != value and (former or key not in FREE):
                what = f"{folder} was written with {key} {value}, this run has {now.get(key)}"
                raise UserError(f"{what}: resume with {key} {value}")
        return engine.load_former(folder) if former else read_state(folder, engine.deepspeed, engine.learner, self.world)

    def _set_aside(self, damaged: list[int]) -> None:
        """Rename damaged checkpoints, so that they count neither as the newest nor among the kept."""
        if self.world.rank == 0 and damaged:
            for step in damaged:
                aside = self.folder / f"damaged_step_{step}"
                if aside.exists():
                    shutil.rmtree(aside)
                (self.folder / f"step_{step}").rename(aside)
        self.world.barrier()

    def _layout(self, engine: Engine) -> dict[str, Any]:
        """Who wrote the checkpoint; but for FREE, what a resumed run must share with it."""
        training = engine.training
        return {
            "ranks": self.world.size,
            "training.zero_stage": training.zero_stage,
            "training.precision": training.precision,
            "training.deepspeed": None if training.deepspeed is None else sha256_file(training.deepspeed),
            "task's data": self.data,
        }

    def _problem(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint, as all ranks see it, or None."""
        expected: dict[str, dict[str, Any]] = {}
        try:
            expected = unsealed((folder / MANIFEST).read_text())["files"]
            problems = [f"{name} is missing" for name in expected if not (folder / name).is_file()]
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems = [f"{MANIFEST}: {error}"]
        if not any(self.world.gather(problems)):
            found = self._over_files(folder, sorted(expected), sync=False)
            problems = [f"{name} has changed" for name in sorted(expected) if found[name] != expected[name]]
        return next((p for rank in self.world.gather(problems) for p in rank), None)

    def _over_files(self, folder: Path, names: list[str], *, sync: bool) -> dict[str, dict[str, Any]]:
        """Size and sha256 of each file, the hashing (and the fsync) shared among the ranks; `names` is the same on all."""
        mine = {}
        for name in names[self.world.rank :: self.world.size]:
            path = folder / name
            if sync:
                fsync_path(path)
            mine[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        return {name: entry for part in self.world.gather(mine) for name, entry in part.items()}
