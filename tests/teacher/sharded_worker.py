"""Runs on two ranks under one launch: sharded teachers against whole ones, the findings as JSON for test_sharded.py to judge."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megapd.errors import UserError
from megapd.signals import Signal, SignalSpec
from megapd.tasks import build_task
from megapd.teacher.engine import Replica, Teacher, TeacherOptions
from megapd.teacher.limits import Demands
from megapd.trajectory import Trajectory
from megapd.world import World, join_world
from tests.teacher.teachers import MODELS, STEPS, configuration

SPECS = [
    SignalSpec("hidden"),
    SignalSpec("dense"),
    SignalSpec("topk", k=3, temperature=2.0),
    SignalSpec("sampled", k=5, seed=3),
    SignalSpec("argmax"),
]


def gap(a: Signal, b: Signal) -> float:
    """Largest difference of anything the two hold; class ids that differ count 1 each, as a share."""
    assert (a.spec, a.teacher, a.samples) == (b.spec, b.teacher, b.samples)
    if a.spec.kind in ("sampled", "argmax"):
        return float((a.values != b.values).double().mean())
    pairs = [(a.values, b.values), (a.logprobs, b.logprobs), (a.log_rest, b.log_rest)]
    if a.spec.kind == "hidden":
        assert a.head is not None
        assert b.head is not None
        pairs += [(a.head.weight, b.head.weight), (a.head.bias, b.head.bias)]
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs if x is not None and y is not None)


def colocated(folder: Path, model: str, sharding: str, resident: int, world: World) -> dict[str, float]:
    """Each rank asks for batches of its own."""
    task = build_task(configuration(model))
    demands = Demands(task.vocabulary_digest, length=task.length)
    lone = replace(world, rank=0, size=1)
    whole = Teacher(Trajectory(folder), lone, TeacherOptions(), demands)
    sharded = Teacher(Trajectory(folder), world, TeacherOptions(sharding=sharding, resident=resident), demands)
    gaps: dict[str, float] = {}
    for step in (*STEPS, STEPS[0], STEPS[1]):
        whole.rotate(step)
        sharded.rotate(step)
        batch = task.batch(step, range(world.rank, world.rank + 2))
        for spec in SPECS:
            found = gap(sharded.signal(batch, spec), whole.signal(batch, spec))
            gaps[spec.kind] = max(gaps.get(spec.kind, 0.0), found)
    resident_now = len(sharded.resident)
    whole.close()
    sharded.close()
    return {**gaps, "resident": resident_now}


def replica(folder: Path, model: str, sharding: str, world: World) -> dict[str, float]:
    """Rank 0 asks, the others follow; batches smaller than the number of ranks too."""
    task = build_task(configuration(model))
    served = Replica(Trajectory(folder), world, TeacherOptions(sharding=sharding, resident=2))
    served.open(STEPS[0])
    if world.rank > 0:
        served.follow()
        return {}
    whole = Teacher(Trajectory(folder), replace(world, size=1), TeacherOptions())
    gaps: dict[str, float] = {}
    for step in (*STEPS, STEPS[1]):
        served.prepare(step)
        served.idle()
        whole.rotate(step)
        for rows in (range(0, 5), range(2, 3)):
            batch = task.batch(step, rows)
            for spec in SPECS:
                signal = replace(served.signal(step, batch, spec), head=None if spec.kind != "hidden" else served.head(step))
                gaps[spec.kind] = max(gaps.get(spec.kind, 0.0), gap(signal, whole.signal(batch, spec)))
    served.close()
    whole.close()
    return gaps


def damaged(folder: Path, sharding: str, world: World) -> dict[str, Any]:
    """One rank alone finds the damage, for the ranks divide the files; all must refuse."""
    teacher = Teacher(Trajectory(folder), world, TeacherOptions(sharding=sharding))
    teacher.rotate(STEPS[0])
    try:
        teacher.rotate(STEPS[1])
    except UserError as error:
        return {"refused": str(error), "held": teacher.held is not None and teacher.held.step}
    finally:
        teacher.close()
    return {"refused": None}


def main(folder: Path) -> None:
    world = join_world()
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    for model in MODELS:
        for sharding in ("zero", "tensor"):
            if f"{model}-{sharding}" != "mlp-tensor":
                results[f"{model}-{sharding}"] = world.gather(colocated(folder / model, model, sharding, 1, world))
                results[f"{model}-{sharding}-replica"] = world.gather(replica(folder / model, model, sharding, world))
    results["resident"] = world.gather(colocated(folder / "gpt", "gpt", "zero", 2, world))
    for sharding in ("zero", "tensor"):
        results[f"damaged-{sharding}"] = world.gather(damaged(folder / "damaged", sharding, world))
    if world.rank == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank"))))
