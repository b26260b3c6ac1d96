"""Checkpoints of every stage and precision on two ranks under one launch; test_state.py judges the results."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from megapd.config import Config, load
from megapd.files import sha256_file
from megapd.tasks import build_task
from megapd.training import CheckpointStore, build_student, start_world, student_engine
from megapd.training.engine import Engine
from megapd.training.state import pieces as layout
from megapd.training.state.store import MANIFEST
from megapd.world import World
from tests.training.worker import GPT

SAVED, STEPS = 3, 6
CARRIED = {"text": "t", "numbers": [1, 0.1 + 0.2, None], "tensor": {"at": [torch.arange(3)]}}
CASES = {
    **{f"{precision}-{stage}": (stage, precision, "adamw") for stage in range(4) for precision in ("fp32", "bf16")},
    **{f"sgd-{stage}": (stage, "fp32", "sgd") for stage in (0, 2, 3)},
}


def settings(case: str, seed: int = 0) -> Config:
    stage, precision, optimizer = CASES[case]
    own = [f"--training.zero_stage={stage}", f"--training.precision={precision}", f"--optimizer.kind={optimizer}"]
    return load(None, [*GPT, *own, "--training.micro_batch=4", f"--seed={seed}"])


def engine_of(config: Config, world: World) -> Engine:
    return student_engine(config, build_student(config, build_task(config)), world)


def steps(engine: Engine, config: Config, world: World, first: int, last: int) -> list[float]:
    """The losses of steps first ... last."""
    task, losses = build_task(config), []
    for step in range(first, last):
        batches = [task.batch(step, rows) for rows in engine.tiling.rows(world.rank)]
        (labelled,) = world.sum(sum(b.labelled for b in batches))
        sums = sum(engine.accumulate(batch, None, labelled) for batch in batches)
        torch.distributed.all_reduce(sums)
        assert engine.step(config.optimizer.lr)
        losses.append((sums[1] / labelled).item())
    return losses


def digest(engine: Engine, world: World) -> str:
    """Of all that the engine updates, and of the weights that the forward pass uses."""
    found = hashlib.sha256()
    optimizer = layout.torch_optimizer(engine.deepspeed)
    for piece in layout.pieces(engine.deepspeed, engine.learner, world.rank):
        for key, tensor in sorted({"weight": piece.flat, **layout.moments(optimizer, piece.flat)}.items()):
            found.update(f"{piece.name} {key} {layout.updates(optimizer, piece.flat)}".encode())
            found.update(piece.of(tensor).contiguous().view(torch.uint8).numpy().tobytes())
    for name, tensor in engine.weights():
        found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def store(folder: Path, world: World) -> CheckpointStore:
    return CheckpointStore(folder, world, 2, "data", "run", adopted=True)


def one(case: str, folder: Path, world: World) -> dict[str, Any]:
    config = settings(case)
    engine = engine_of(config, world)
    steps(engine, config, world, 0, SAVED)
    saved = digest(engine, world)
    store(folder / case, world).save(engine, SAVED, CARRIED)
    former = folder / f"{case}-former"
    engine.deepspeed.save_checkpoint(
        str(former), tag=f"step_{SAVED}", client_state={"step": SAVED, "known": [1]}, save_latest=False
    )
    world.on_first(lambda: manifest(former / f"step_{SAVED}", config, world))
    losses = steps(engine, config, world, SAVED, STEPS)
    whole = digest(engine, world)
    engine.destroy()
    found: dict[str, Any] = {"saved": saved, "whole": whole, "losses": losses}
    for kind, place in (("ours", folder / case), ("former", former)):
        engine = engine_of(settings(case, seed=1), world)
        carried = store(place, world).restore(engine)
        assert carried is not None
        found[kind] = {"read": digest(engine, world), "losses": steps(engine, config, world, SAVED, STEPS)}
        found[kind] |= {"end": digest(engine, world), "carried": json.loads(json.dumps(carried, default=lambda t: t.tolist()))}
        engine.destroy()
    return found


def manifest(folder: Path, config: Config, world: World) -> None:
    """As an older megapd wrote it beside DeepSpeed's files."""
    training = {"training.zero_stage": config.training.zero_stage, "training.precision": config.training.precision}
    facts = {"ranks": world.size, **training, "training.deepspeed": None, "task's data": "data"}
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    entries = {name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for name, path in files.items()}
    (folder / MANIFEST).write_text(json.dumps({"step": SAVED, "layout": facts, "files": entries}))


def main(folder: Path) -> None:
    world = start_world()
    results = {case: world.gather(one(case, folder, world)) for case in CASES}
    if world.rank == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
