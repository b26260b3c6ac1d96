"""What can be found out of a configuration, its machines and its run before it costs a run: `megapd doctor`.

Nothing here writes to a run's folder. Those that are cheap a start makes too: settings equal on all ranks, one folder, room for a
checkpoint, limits of the teacher, pieces of the run.
"""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megapd import __version__
from megapd.config import Config
from megapd.corpus import verify
from megapd.errors import UserError
from megapd.evaluation import check_samples
from megapd.files import machine_cores
from megapd.models import parameter_count
from megapd.network import host_of
from megapd.schedule.changes import FILE as CHANGES
from megapd.schedule.changes import ChangeLog
from megapd.schedule.plan import Plan
from megapd.schedule.resolve import resolve_plan
from megapd.tasks import Task, build_task
from megapd.teacher.limits import check_teachers
from megapd.teacher.locate import open_trajectory
from megapd.training import CheckpointStore, build_student
from megapd.training.folder import METRICS, RunRecord, agree, changed_lines, check_room, examine, held, room_for, seen_by_all
from megapd.trajectory import Checkpoints
from megapd.world import World

State = Literal["ok", "warning", "FAULT"]
CONNECT_SECONDS = 3.0


@dataclass(frozen=True)
class Check:
    """name: what was looked at. found: what was found; of a fault, how to go on, too."""

    name: str
    state: State
    found: str


class Warned(Exception):
    """What is found is worth a line, and stops no run."""


def checks(config: Config, world: World) -> Iterator[Check]:
    """One after the other, the same on all ranks. A collective; what a check needs of those before it may be missing.

    A fault ends those that rest on it: no task, no checks of the teacher against it.
    """
    yield of("ranks", lambda: ranks(world))
    yield of("threads", lambda: threads(world))
    yield of("precision", lambda: precision(config, world))
    yield of("runs_dir", lambda: shared(config, world))
    task: list[Task] = []
    yield of("task", lambda: described(config, task))
    if task:
        yield of("settings", lambda: settings(config, world, task[0]))
        yield of("room", lambda: room(config, task[0]))
    if config.task.kind == "text":
        yield of("corpus", lambda: f"{verify(config.corpus.output):,} blocks as they were written")
    if config.teacher is not None and task:
        yield from teacher(config, task[0])
    for setting, address in addresses(config):
        yield of(setting, lambda address=address: reachable(address))  # type: ignore[misc]
    if task:
        yield from run(config, world, task[0])


def of(name: str, look: Callable[[], str]) -> Check:
    """What `look` finds; a UserError is a fault, and Warned a warning."""
    try:
        return Check(name, "ok", look())
    except UserError as error:
        return Check(name, "FAULT", str(error))
    except Warned as warning:
        return Check(name, "warning", str(warning))


# ------------------------------------------------------------------------------------------------------------- machines


def ranks(world: World) -> str:
    names = ("torch", "deepspeed", "triton")
    versions = {name: _version(name) for name in names} | {"megapd": __version__, "Python": platform.python_version()}
    first, *others = world.gather((socket.gethostname(), versions)) if world.size > 1 else [(socket.gethostname(), versions)]
    for rank, (host, found) in enumerate(others, start=1):
        for name in versions:
            if found[name] != first[1][name]:
                what = f"{name} is {found[name]} on rank {rank} ({host}) and {first[1][name]} on rank 0 ({first[0]})"
                raise UserError(f"{what}; install the same everywhere")
    hosts = len({host for host, _ in [first, *others]})
    told = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"{world.size} on {hosts} host{'s' if hosts > 1 else ''}, {world.device.type}; {told}"


def threads(world: World) -> str:
    mine = (socket.gethostname(), torch.get_num_threads(), machine_cores())
    everybody = world.gather(mine) if world.size > 1 else [mine]
    for host, _, cores in everybody:
        wanted = sum(count for name, count, _ in everybody if name == host)
        if wanted > cores:
            raise Warned(f"{wanted} threads of torch for {cores} cores on {host}: set OMP_NUM_THREADS to the cores a rank has")
    return f"{mine[1]} a rank, {mine[2]} cores"


def precision(config: Config, world: World) -> str:
    if config.training.precision == "fp16" and world.device.type == "cpu":
        raise UserError("training.precision: fp16 needs a GPU; on a CPU choose bf16 or fp32")
    return config.training.precision


def shared(config: Config, world: World) -> str:
    """A probe beside the runs, which every rank must see; it goes."""
    above = config.runs_dir
    while not above.exists():
        above = above.parent

    def write() -> str:
        try:
            with tempfile.NamedTemporaryFile(dir=above, prefix=".doctor-", delete=False) as file:
                file.write(file.name.encode())
        except OSError as error:
            raise UserError(f"runs_dir: cannot write to {above}: {error}; choose another, or have it made writable") from error
        return file.name

    probe = Path(world.on_first(write))
    try:
        seen_by_all(world, probe, str(probe))
    finally:
        world.on_first(lambda: probe.unlink(missing_ok=True))
    return f"{config.runs_dir} can be written to" + (" and is one folder for all ranks" if world.size > 1 else "")


def room(config: Config, task: Task) -> str:
    parameters = parameter_count(build_student(config, task))[0]
    need = room_for(config, parameters)
    return f"{check_room(config, parameters) / 2**30:.1f} GiB free where {need / 2**30:.2f} GiB are needed"


# ------------------------------------------------------------------------------------------------------------- learning


def described(config: Config, found: list[Task]) -> str:
    found.append(build_task(config))
    check_samples(found[0], config.evaluation.samples)
    samples = f"{found[0].heldout_samples:,} held-out samples"
    return f"{config.task.kind}: {found[0].length:,} tokens a sample, {found[0].classes:,} classes, {samples}"


def settings(config: Config, world: World, task: Task) -> str:
    agree(world, config, {"data": task.data_digest, "vocabulary": task.vocabulary_digest})
    return "equal on all ranks" if world.size > 1 else "of one rank"


def teacher(config: Config, task: Task) -> Iterator[Check]:
    opened: list[tuple[Checkpoints, Plan]] = []

    def schedule() -> str:
        trajectory = open_trajectory(config)
        plan = resolve_plan(config, trajectory)
        opened.append((trajectory, plan))
        if plan.warnings:
            raise Warned("; ".join(plan.warnings))
        return f"{plan.policy}: {len(plan.points)} checkpoints of {len(trajectory.steps)} teach {plan.steps:,} steps"

    yield of("schedule", schedule)
    for trajectory, plan in opened:
        yield of("teacher", lambda t=trajectory, p=plan: fits(config, task, t, p))  # type: ignore[misc]
        if hasattr(trajectory, "verify"):
            yield of("trajectory", lambda t=trajectory: whole(t))  # type: ignore[misc]


def fits(config: Config, task: Task, trajectory: Checkpoints, plan: Plan) -> str:
    check_teachers(config, task, trajectory, plan)
    return "its ids, positions, classes and vocabulary fit the task"


def whole(trajectory: Any) -> str:
    if problems := trajectory.verify():
        raise UserError(f"{'; '.join(problems[:2])}{' ...' * (len(problems) > 2)}; restore the files, or leave the steps out")
    return f"{len(trajectory.steps)} checkpoints as they were written"


# -------------------------------------------------------------------------------------------------------------- network


def addresses(config: Config) -> Iterator[tuple[str, str]]:
    """Setting and address of each service that the run would call."""
    if config.scheduler.url is not None:
        yield "scheduler.url", config.scheduler.url
    if config.teacher is not None and config.teacher.carrier == "served":
        yield from (("teacher.endpoints", endpoint) for endpoint in config.teacher.endpoints)


def reachable(address: str) -> str:
    host, port = host_of(address), address.rpartition(":")[2].strip("/")
    number = int(port) if port.isdigit() else (443 if address.startswith("https") else 80)
    try:
        socket.create_connection((host or "", number), CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(f"{address}: {error}; start it, or correct the address") from error
    return f"{address} answers"


# ------------------------------------------------------------------------------------------------------------------ run


def run(config: Config, world: World, task: Task) -> Iterator[Check]:
    """The run that the folder of the configuration holds, if it holds one."""
    found: list[RunRecord] = []
    folder = config.folder

    def record() -> str:
        known = examine(config) if folder.exists() else None
        if known is None:
            return f"{folder} holds none: a start begins one"
        found.append(known)
        if held(folder):
            raise Warned(f"{known.id} in {folder}: a process trains it now")
        return f"{known.id} in {folder}: {len(known.segments)} starts, newest checkpoint at step {known.saved:,}"

    yield of("run", record)
    for known in found:
        yield of("checkpoints", lambda k=known: checkpoints(config, world, task, k))  # type: ignore[misc]
        yield of("changes", lambda k=known: f"{len(ChangeLog(folder / CHANGES, k.id).changes)} on record")  # type: ignore[misc]
        yield of("metrics", lambda k=known: metrics(folder, k))  # type: ignore[misc]


def checkpoints(config: Config, world: World, task: Task, known: RunRecord) -> str:
    folder = config.folder / "checkpoints"
    store = CheckpointStore(folder, world, config.checkpoint.keep, task.data_digest, known.id, adopted=known.adopted)
    damaged = [f"step_{step}: {problem}" for step in store.steps() if (problem := store.problem(step)) is not None]
    newest = store.newest()
    if damaged:
        raise Warned(f"{'; '.join(damaged)}; a start goes on from step {newest[0] if newest else 0}")
    return f"{len(store.steps())} whole"


def metrics(folder: Path, known: RunRecord) -> str:
    if changed_lines(folder / METRICS, known.saved, known.lines):
        raise Warned(f"{folder / METRICS}: its lines up to step {known.saved} are not those that the run wrote")
    return "as the run wrote them"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
