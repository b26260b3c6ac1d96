"""A run's folder is opened: locked, found to be whole, and known to all ranks as the same."""

from __future__ import annotations

import importlib.metadata
import logging
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from megapd import __version__
from megapd.config import Config, complete, dump, flatten, public_tree
from megapd.errors import DiskFailed, UserError
from megapd.files import check_run, write_atomic, writing
from megapd.schedule.changes import FILE as CHANGES
from megapd.schedule.record import FILE as SCHEDULE
from megapd.schedule.reports import FORMER_FILE, REPORTS_FILE
from megapd.training.folder import numerics
from megapd.training.folder.lock import FILE as LOCK
from megapd.training.folder.lock import RunLock
from megapd.training.folder.metrics import METRICS, MetricsFile, named_run
from megapd.training.folder.record import FILE, RunRecord, new_record, read_record
from megapd.training.folder.settings import FREE_SETTINGS, LOCAL_SETTINGS, changed_settings
from megapd.trajectory import named_runs
from megapd.world import World

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
PIECES = (METRICS, SCHEDULE, CHANGES, REPORTS_FILE, FORMER_FILE)
SEEN_SECONDS = 30.0  # a shared file system may show a new file to other machines this much later
log = logging.getLogger(__name__)


class RunFolder:
    """The folder of a run that this process may train, on rank 0; the others know whose it is.

    run      the run's id, the same on every rank
    resumed  whether it goes on, else it begins
    adopted  whether it was begun by a megapd whose files name no run
    changed  settings that differ from those of the last start, each [before, now]; on rank 0
    """

    def __init__(self, run: str, *, resumed: bool, adopted: bool) -> None:
        self.run, self.resumed, self.adopted = run, resumed, adopted
        self.changed: dict[str, list[Any]] = {}
        self.record: RunRecord | None = None
        self._lock: RunLock | None = None
        self._segment: dict[str, Any] = {}
        self._fresh = False  # made by this start
        self._lines_every = 1  # steps between lines of metrics, at the most, over all starts
        self._metrics: MetricsFile | None = None

    def open_metrics(self, step: int) -> MetricsFile:
        """On rank 0: metrics.jsonl of the run that goes on from `step`; the caller closes it."""
        assert self.record is not None
        known = self.record.saved, self.record.lines
        self._metrics = MetricsFile(self.record.path.parent, self.run, step, self._lines_every, known)
        return self._metrics

    def begin(self, step: int) -> None:
        """Before the first step of this start, or its first checkpoint: from here on the run's settings are on record."""
        if self.record is not None and self._segment:
            self.record.segments.append({**self._segment, "step": step})
            try:
                self.record.write()
            except BaseException:
                self.record.segments.pop()
                raise
            self._segment = {}

    def saved(self, step: int) -> None:
        """A checkpoint of `step` steps is on the disk."""
        self.begin(step)
        if self.record is not None:
            self.record.saved, self.record.lines = step, "" if self._metrics is None else self._metrics.digest
            self.record.write()

    def check(self) -> None:
        """Raises RunFailed where another process has taken the folder over."""
        if self._lock is not None:
            self._lock.check()

    def close(self) -> None:
        """A start that failed before its first step leaves nothing in a folder that it made."""
        if self.record is not None and self._fresh and not self.record.began:
            _forget(self.record.path.parent)
        if self._lock is not None:
            self._lock.close()
            if self.record is not None and self._fresh and not self.record.began:
                self._lock.path.unlink(missing_ok=True)
                _remove_if_empty(self._lock.path.parent)


def agree(world: World, config: Config, digests: Mapping[str, str]) -> None:
    """UserError on all ranks, naming the first difference, unless they have the same settings, versions and data; one gather."""
    settings = {k: v for k, v in flatten(public_tree(config)).items() if not k.startswith(LOCAL_SETTINGS)}
    mine = {"megapd": __version__, "numerics": numerics.VERSION, **settings}
    mine |= {f"the digest of the {name}": digest for name, digest in digests.items()}
    if world.size == 1:
        return
    first, *others = world.gather((socket.gethostname(), mine))
    for rank, (host, facts) in enumerate(others, start=1):
        for key in [k for k in (*first[1], *facts) if first[1].get(k) != facts.get(k)][:1]:
            what = f"{key} is {facts.get(key)!r} on rank {rank} ({host}) and {first[1].get(key)!r} on rank 0 ({first[0]})"
            raise UserError(f"{what}; give every rank the same file, variables, packages and data")


def open_folder(
    world: World, config: Config, digests: Mapping[str, str], *, allow_change: Sequence[str] = (), take_over: bool = False
) -> RunFolder:
    """Lock the folder of `config`, and see that it holds the whole of one run, or none. A collective; the caller closes it.

    digests: of the data and the vocabulary. Raises UserError on all ranks together, before anything in it has changed.
    """
    opened: list[RunFolder] = []

    def on_first() -> tuple[str, bool, bool, str]:
        folder, lock = _open(config, digests, world, allow_change, take_over)
        opened.append(folder)
        return folder.run, folder.resumed, folder.adopted, lock.token

    run, resumed, adopted, token = world.on_first(on_first)
    found = opened[0] if opened else RunFolder(run, resumed=resumed, adopted=adopted)
    try:
        seen_by_all(world, config.folder / "lock", token)
    except BaseException:
        found.close()
        raise
    return found


def check_config(folder: Path) -> None:
    """UserError unless config.yaml is the one that run.json has on record, or there is no run.json."""
    record, tree = read_record(folder), _read_config(folder)
    if record is not None and tree is not None:
        _check_same(folder, tree, record.settings)


def check_weights(folder: Path) -> RunRecord | None:
    """The run's record, before its weights are read: config.yaml is the recorded one, and the trajectory the run's own.

    None: there is no run.json. Raises UserError.
    """
    check_config(folder)
    record = read_record(folder)
    if record is not None:
        for path, named in named_runs(folder / "trajectory"):
            check_run(path, named, record.id)
    return record


# ------------------------------------------------------------------------------------------------------------ what is there


def _open(
    config: Config, digests: Mapping[str, str], world: World, allow_change: Sequence[str], take_over: bool
) -> tuple[RunFolder, RunLock]:
    folder = config.folder
    made = not folder.exists()
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = RunLock(folder, take_over=take_over)
    except DiskFailed as error:
        if made and folder.exists():
            (folder / LOCK).unlink(missing_ok=True)
            _remove_if_empty(folder)
        raise DiskFailed(f"runs_dir: {error}") from error
    except OSError as error:
        raise UserError(f"runs_dir: cannot write to {folder}: {error}") from error
    try:
        record = examine(config)
        opened, changed = _resume(config, record, digests, world, allow_change) if record else _begin(config, digests)
        opened._lock = lock
        opened._segment, opened.changed = _segment(world.size, changed), changed
    except BaseException:
        lock.close()
        if made:
            lock.path.unlink(missing_ok=True)
            _remove_if_empty(folder)
        raise
    return opened, lock


def examine(config: Config) -> RunRecord | None:
    """The record of the run that the folder holds, made if an older megapd began it; None: none. UserError if a piece lacks."""
    folder = config.folder
    record, saved = read_record(folder), _read_config(folder)
    steps = _steps(folder)
    if record is not None:
        if not record.began:
            return None
        if saved is None:
            what = f"{folder / CONFIG} is missing; {FILE} beside it has the same settings"
            raise UserError(f"{what}: write them there (YAML or JSON), restore it from a copy, or choose another name")
        _check_same(folder, saved, record.settings)
        if record.saved >= 0 and not steps:
            what = f"{folder / CHECKPOINTS} holds no checkpoint, but this run saved one at step {record.saved}"
            raise UserError(f"{what}; restore them, or choose another name to begin again")
        if steps and steps[-1] < record.saved:
            log.warning("%s: the newest checkpoint there is step_%d, this run had saved step_%d", folder, steps[-1], record.saved)
        _check_pieces(config, record)
        return record
    there = [name for name in PIECES if (folder / name).exists()] + ([CHECKPOINTS] if steps else [])
    if saved is None:
        there += ["trajectory"] if named_runs(folder / "trajectory") else []
        if there:
            what = f"{folder} holds {', '.join(there)}, but neither {FILE} nor {CONFIG}"
            raise UserError(f"{what}; restore them from a copy, or choose another name")
        return None
    named = _named(folder)
    if named:
        raise UserError(f"{folder / FILE} is missing, and {named} names a run; restore it from a copy, or choose another name")
    adopted = new_record(folder, {}, saved, adopted=True, saved=steps[-1] if steps else -1)
    return adopted if there else None


def _check_pieces(config: Config, record: RunRecord) -> None:
    """Each file that names a run names this one, and what its first step needed is there."""
    folder = config.folder
    for path, named in [(folder / METRICS, named_run(folder / METRICS)), *named_runs(folder / "trajectory")]:
        check_run(path, named, record.id)
    if config.teacher is not None and not record.adopted and not (folder / SCHEDULE).exists():
        what = f"{folder / SCHEDULE}, which says who taught this run, is missing"
        raise UserError(f"{what}; restore it from a copy, or choose another name")
    if not (folder / METRICS).exists():
        log.warning("%s is missing: the lines that it had are lost, the run itself is not", folder / METRICS)


def _named(folder: Path) -> str:
    """A file there that names a run, "" for none."""
    files = [(folder / METRICS, named_run(folder / METRICS)), *named_runs(folder / "trajectory")]
    return next((path.name for path, named in files if named is not None), "")


def _resume(
    config: Config, record: RunRecord, digests: Mapping[str, str], world: World, allow_change: Sequence[str]
) -> tuple[RunFolder, dict[str, list[Any]]]:
    folder = config.folder
    if not config.checkpoint.resume:
        raise UserError(f"{folder} holds a run already: set checkpoint.resume true to continue it, or choose another name")
    changed = changed_settings(folder, record.settings, config, allow_change)
    for name, digest in digests.items():
        if record.digests.get(name, digest) != digest:
            what = f"the {name} that the task reads have digest {digest[:16]}, this run began with {record.digests[name][:16]}"
            raise UserError(f"task: {what}; restore them, or choose another name")
    if affected := numerics.affected(config, world, record.numerics):
        what = f"{folder} began with numerics version {record.numerics}, this megapd has {numerics.VERSION}"
        raise UserError(f"{what}: {'; '.join(affected)}; go on with the megapd that began it, or choose another name")
    record.settings, record.digests = public_tree(config), {**record.digests, **digests}
    found = _with_record(record, resumed=True)
    others = [segment["changed"].get("telemetry.every", [1])[0] for segment in record.segments]
    found._lines_every = max(config.telemetry.every, *changed.get("telemetry.every", [1]), *others)
    return found, changed


def _begin(config: Config, digests: Mapping[str, str]) -> tuple[RunFolder, dict[str, list[Any]]]:
    _forget(config.folder)
    record = new_record(config.folder, digests, public_tree(config), numerics=numerics.VERSION)
    found = _with_record(record, resumed=False)
    found._fresh = True
    record.write()
    return found, {}


def _with_record(record: RunRecord, *, resumed: bool) -> RunFolder:
    found = RunFolder(record.id, resumed=resumed, adopted=record.adopted)
    found.record = record
    return found


def _segment(ranks: int, changed: dict[str, list[Any]]) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "deepspeed")}
    start = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "host": socket.gethostname(), "ranks": ranks}
    return {**start, "megapd": __version__, "numerics": numerics.VERSION, **versions, "changed": changed}


def _forget(folder: Path) -> None:
    """Remove what a start that made no step left behind."""
    for name in (FILE, CONFIG, *PIECES):
        (folder / name).unlink(missing_ok=True)


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


def _read_config(folder: Path) -> dict[str, Any] | None:
    path = folder / CONFIG
    if not path.exists():
        return None
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}); restore it from a copy") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: damaged (no mapping of sections); restore it from a copy, or from {FILE} beside it")
    return tree


def _check_same(folder: Path, saved: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    there, wanted = flatten(complete(saved)[0]), flatten(complete(recorded)[0])
    for key in sorted(there.keys() | wanted.keys()):
        # What may always differ is written to one after the other: a crash may come between.
        if there.get(key) != wanted.get(key) and not key.startswith(FREE_SETTINGS):
            what = f"{folder / CONFIG} has {key} {there.get(key)!r}, {FILE} beside it {wanted.get(key)!r}"
            raise UserError(f"{what}; restore the file that was changed, and give other settings to `megapd train` instead")


def _steps(folder: Path) -> list[int]:
    names: Iterable[str] = (path.name.removeprefix("step_") for path in (folder / CHECKPOINTS).glob("step_*"))
    return sorted(int(name) for name in names if name.isdigit())


def seen_by_all(world: World, path: Path, token: str) -> None:
    """UserError on all ranks unless each sees in the file `path` the token that rank 0 wrote there. A collective."""
    if blind := [told for told in world.gather(_unseen(path, token, world.rank)) if told]:
        raise UserError(f"runs_dir: {blind[0]}; it must be one folder, on a file system that all machines share")


def _unseen(path: Path, token: str, rank: int) -> str:
    """What this rank misses of the lock that rank 0 wrote, "" for nothing."""
    deadline, seen = time.monotonic() + SEEN_SECONDS, _contains(path, token)
    while not seen() and time.monotonic() < deadline:
        time.sleep(0.5)
    return "" if seen() else f"rank {rank} on {socket.gethostname()} does not see {path.parent} as rank 0 does"


def _contains(path: Path, token: str) -> Callable[[], bool]:
    return lambda: path.exists() and token in path.read_text(errors="replace")


def write_config(folder: Path, config: Config) -> None:
    write_atomic(folder / CONFIG, dump(config))
