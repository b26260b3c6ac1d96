"""How a run is put together, or resumed where its folder stopped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, TypeVar

import yaml

from megapd import registry
from megapd.config import RETIRED_SETTINGS, Config, dump, flatten
from megapd.errors import UserError
from megapd.files import write_atomic
from megapd.models import Learner, build_model
from megapd.schedule.resolve import resolve_plan
from megapd.tasks import Task, build_task
from megapd.teacher.locate import open_trajectory
from megapd.training.callbacks import Checkpointer, Evaluation, TrajectoryWriter
from megapd.training.checkpoint import CheckpointStore
from megapd.training.engine import Engine, start_world
from megapd.training.run import Callback, Progress, Run, StopRequest
from megapd.training.teaching import open_teaching
from megapd.training.telemetry import Meter, Telemetry
from megapd.world import World
from megapd_kernels import LossOptions

Entry = TypeVar("Entry")

# What may differ between a run's start and its resumption: nothing here changes what the run learns. Streams are
# interchangeable, and schedule.json holds a resumed run to the digests of its teachers, wherever they lie. Callbacks look on; one
# whose state the checkpoint carries must be named again.
FREE_TEACHER = "trajectory sharding resident carrier cache endpoints token root_certificate certificate key depth"
FREE_TEACHER += " call_seconds deadline_seconds on_failure server."
FREE = "checkpoint. telemetry. scheduler. runs_dir corpus.sources evaluation.micro_batch training.prefetch training.callbacks"
FREE_SETTINGS = (*FREE.split(), *(f"teacher.{key}" for key in FREE_TEACHER.split()))


def build_student(config: Config, task: Task) -> Learner:
    try:
        options = LossOptions(**config.loss.model_dump())
    except ValueError as error:
        raise UserError(f"loss.{error}") from error
    return build_model(
        config.model, vocab_size=task.vocab_size, classes=task.classes, length=task.length, options=options, seed=config.seed
    )


def student_engine(config: Config, learner: Learner, world: World) -> Engine:
    """The student under ZeRO on the ranks of `world`; a collective."""
    if config.training.precision == "fp16" and world.device.type == "cpu":
        raise UserError("training.precision: fp16 needs a GPU; on a CPU choose bf16 or fp32")
    return Engine(learner, config.training, config.optimizer, world, compiled=bool(getattr(config.model, "compile", False)))


def start(config: Config, callbacks: Sequence[Callback] = ()) -> Run:
    """Build the run, or resume it where its folder stopped; the caller closes it. Raises UserError before anything is written.

    callbacks: called after those that training.callbacks names; see `order`.
    """
    task = build_task(config)
    curriculum = None
    if config.teacher is not None:
        trajectory = open_trajectory(config)
        curriculum = trajectory, resolve_plan(config, trajectory)
    named = [make() for make in _registered(registry.callbacks, config.training.callbacks, "training.callbacks")]
    whole = order(config, [*named, *callbacks])
    with ExitStack() as opened:
        learner = build_student(config, task)
        world = start_world()
        engine = student_engine(config, learner, world)
        opened.callback(engine.destroy)
        store = CheckpointStore(config.folder / "checkpoints", world, config.checkpoint.keep, task.data_digest)
        resumed = _check_folder(config)
        world.barrier()  # no rank may look at the folder after rank 0 has begun to write it
        restored = (store.restore(engine) if resumed else None) or {}
        _restore_callbacks(whole, restored.get("callbacks", {}))
        progress = Progress(**{key: restored[key] for key in asdict(Progress()) if key in restored})
        teaching = open_teaching(config, task, world, curriculum, restored, resumed=resumed)
        opened.callback(teaching.close)
        if world.rank == 0:
            try:
                write_atomic(config.folder / "config.yaml", dump(config))
            except OSError as error:
                raise UserError(f"runs_dir: cannot write to {config.folder}: {error}") from error
        for callback in whole:
            opened.callback(callback.close)
        stop = StopRequest(config.folder / "stop", watches_file=world.rank == 0)
        first, saved = progress.step, int(restored.get("step", -1))
        return Run(config, world, task, engine, teaching, store, stop, whole, progress, first, saved, opened.pop_all())


def order(config: Config, added: Sequence[Callback]) -> list[Callback]:
    """All callbacks of a run, in the order in which they are called.

    The meter, whose numbers the others see; those that were added, in their order; then what acts on the step: telemetry writes
    the line of metrics before the evaluation leads to its own, the trajectory's weights carry both, and the checkpoint carries
    the states of all.
    """
    if twice := [name for name, count in Counter(callback.name for callback in added).items() if count > 1]:
        raise UserError(f"training.callbacks: two are called {twice[0]!r}; give one another name, the key of its state")
    trackers = _registered(registry.trackers, config.telemetry.trackers, "telemetry.trackers")
    return [Meter(), *added, Telemetry(trackers), Evaluation(), TrajectoryWriter(), Checkpointer()]


def _registered(entries: registry.Registry[Entry], names: Sequence[str], setting: str) -> list[Entry]:
    try:
        return [entries.get(name) for name in names]
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error


def _restore_callbacks(callbacks: Sequence[Callback], states: dict[str, dict[str, Any]]) -> None:
    if missing := states.keys() - {callback.name for callback in callbacks}:
        what = f"the run's checkpoint carries the state of {', '.join(sorted(missing))}"
        raise UserError(f"training.callbacks: {what}; name it again, or start a run of another name")
    for callback in callbacks:
        if callback.name in states:
            callback.load_state_dict(states[callback.name])


def _check_folder(config: Config) -> bool:
    """Whether the run's folder is to be resumed; UserError if it holds another run, or may not be resumed."""
    saved = config.folder / "config.yaml"
    if not saved.exists():
        if any((config.folder / "checkpoints").glob("step_*")):  # config.yaml is there before the first of them
            raise UserError(f"{saved} is missing, but there are checkpoints beside it: restore it, or choose another name")
        return False
    if not config.checkpoint.resume:
        raise UserError(f"{config.folder} holds a run already: set checkpoint.resume true to continue it, or choose another name")
    before, now = flatten(yaml.safe_load(saved.read_text())), flatten(config.model_dump(mode="json"))
    for key in sorted((before.keys() | now.keys()) - set(RETIRED_SETTINGS)):
        if before.get(key) != now.get(key) and not key.startswith(FREE_SETTINGS):
            what = f"{key} was {before.get(key)!r} when {config.folder} began and is {now.get(key)!r} now"
            raise UserError(f"{what}; a resumed run keeps its settings: restore it, or choose another name")
    return True
