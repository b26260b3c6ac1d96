"""From a configuration to what is asked of the teacher, and the stream that carries the answers."""

from __future__ import annotations

import json
from collections.abc import Callable

from megapd.config import Config, TeacherConfig
from megapd.errors import UserError
from megapd.models import Shape, checkpoint_shape, teacher_logit_form
from megapd.registry import signal_kinds
from megapd.schedule.plan import Plan
from megapd.signals import Encoding, SignalSpec, definition_of, negotiate
from megapd.tasks import Task, tokens_per_sample
from megapd.teacher.cache import CachedStream, SignalCache
from megapd.teacher.engine import Teacher, TeacherOptions
from megapd.teacher.limits import Demands
from megapd.teacher.locate import open_endpoints
from megapd.teacher.stream import ColocatedStream, Stream
from megapd.trajectory import Checkpoint, Checkpoints
from megapd.world import World


def teacher_options(config: Config, *, served: bool = False) -> TeacherOptions:
    """served: of a server, whose students ask for the next checkpoint while others still need the present one."""
    assert config.teacher is not None
    return TeacherOptions(
        precision=config.teacher.precision or config.training.precision,
        sharding=config.teacher.sharding,
        resident=config.teacher.resident or (2 if served else 1),
        chunk_bytes=config.loss.chunk_bytes,
        wait_seconds=None if config.schedule is None else config.schedule.waits,
    )


def signal_spec(config: Config, task: Task, plan: Plan, checkpoint: Checkpoint) -> SignalSpec:
    """The kind asked for, or for `auto` the cheapest exact one, given one of the teacher's checkpoints."""
    assert config.teacher is not None
    teacher, shape = config.teacher, checkpoint_shape(checkpoint)
    kind: str = teacher.signal
    if kind == "auto":
        positions = config.training.global_batch * task.labelled_per_sample * plan.steps / len(plan.fixed())
        kind = negotiate(shape.classes, shape.width, config.loss.teacher_temperature, config.loss.divergence, positions)
    precision: Encoding = teacher.precision or config.training.precision
    definition = definition_of(kind)
    encoding = precision if teacher.encoding == "auto" or teacher.encoding not in definition.encodings else teacher.encoding
    if "temperature" in definition.uses and teacher_logit_form(checkpoint) != (1.0, None):
        what = f"{kind} holds probabilities, and this teacher scales or caps its logits after the head"
        raise UserError(f"teacher.signal: {what}; choose hidden, dense or argmax")
    temperature = config.loss.teacher_temperature
    spec = definition.spec(kind, encoding, classes=shape.classes, k=teacher.k, temperature=temperature, seed=config.seed)
    if shape.classes > task.classes and spec.columns[0].holds == "ids":
        what = f"{kind} names classes by ids up to {shape.classes - 1}, the student has {task.classes}"
        raise UserError(f"teacher.signal: {what}; choose dense or hidden, of which loss.common_vocabulary takes those of both")
    return spec


def describe_signal(task: Task, spec: SignalSpec, shape: Shape) -> str:
    """What the signal costs, in bytes a labelled position and a token, beside the other exact kinds."""
    share = task.labelled_per_sample / tokens_per_sample(task)

    def cost(asked: SignalSpec) -> str:
        size = asked.bytes_per_position(shape.classes, shape.width)
        return f"{size:,.0f} bytes a labelled position, {size * share:,.4g} a token"

    kinds = {name: definition_of(name) for name in signal_kinds.names() if name != spec.kind}
    lossless = [name for name, kind in kinds.items() if kind.lossless and spec.encoding in kind.encodings]
    others = [SignalSpec(name, spec.encoding) for name in lossless]
    against = "".join(f"; {other.kind} would be {cost(other)}" for other in others)
    head = shape.classes * shape.width * 4 if spec.definition.with_head else 0
    once = f", and a head of up to {head:,} bytes a rotation" if head else ""
    details = "".join(f", {key} {value}" for key, value in json.loads(spec.parameters).items() if key != "kind")
    return f"signal {spec.kind}{details}: {cost(spec)}{once}{against}"


def open_stream(config: Config, task: Task, trajectory: Checkpoints, plan: Plan, world: World, step: int) -> Stream:
    """The stream of the run, the teacher of `step` in place: a damaged or foreign checkpoint shows before the run begins."""
    assert config.teacher is not None
    teacher = config.teacher
    if teacher.carrier != "cached":
        source = open_source(config, task, trajectory, plan, world, step)
        if teacher.cache is None or teacher.on_failure == "cache":
            return source
        try:
            classes = checkpoint_shape(source.teacher(step)).classes
            agree, cache = rank_agreement(teacher, world), SignalCache(teacher.cache)
            return CachedStream(cache, plan, source.spec, trajectory, source, classes=classes, agree=agree)
        except BaseException:
            source.close()
            raise
    assert teacher.cache is not None
    spec = signal_spec(config, task, plan, _checked(config, task, trajectory, plan, step))
    return CachedStream(SignalCache(teacher.cache), plan, spec, trajectory)


def open_source(config: Config, task: Task, trajectory: Checkpoints, plan: Plan, world: World, step: int) -> Stream:
    """A stream from a teacher itself, here or served; whatever was recorded is left aside."""
    assert config.teacher is not None
    teacher = config.teacher
    if teacher.carrier == "colocated":
        own = Teacher(trajectory, world, teacher_options(config), Demands.of(config, task))
        try:
            checkpoint = own.rotate(plan.checkpoint_at(step))
            return ColocatedStream(own, plan, signal_spec(config, task, plan, checkpoint))
        except BaseException:
            own.close()  # its reader may be waiting for a file, and would keep the process alive
            raise
    from megapd.teacher.client import ServedStream

    spec = signal_spec(config, task, plan, _checked(config, task, trajectory, plan, step))
    endpoints = open_endpoints(config)
    try:
        endpoints.current()  # a token that the scheduler refuses shows before the run begins
        shared_memory = teacher.carrier == "shared_memory"
        return ServedStream(
            teacher, plan, spec, trajectory, device=world.device, shared_memory=shared_memory, endpoints=endpoints
        )
    except BaseException:
        endpoints.close()
        raise


def _checked(config: Config, task: Task, trajectory: Checkpoints, plan: Plan, step: int) -> Checkpoint:
    """The checkpoint that teaches `step`, as soon as it is written; UserError if it cannot teach the task."""
    wanted, wait = plan.checkpoint_at(step), teacher_options(config).wait_seconds
    checkpoint = trajectory.checkpoint(wanted) if wait is None else trajectory.wait_for(wanted, wait)
    Demands.of(config, task).check(checkpoint)
    return checkpoint


def rank_agreement(teacher: TeacherConfig, world: World) -> Callable[[list[bool]], list[bool]] | None:
    """For CachedStream: which of a step's flags are set on any rank, where ranks answer each other's batches."""
    if teacher.carrier != "colocated" or teacher.sharding == "whole":
        return None
    return lambda flags: [count > 0 for count in world.sum(*map(int, flags))]
