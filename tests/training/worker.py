"""Runs on two ranks under one launch: many DeepSpeed cases, the results as JSON for test_zero.py to judge.

A launch costs many seconds of imports and a case well under one, hence one process for all cases.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.utils
import torch

from megapd.config import Config, load
from megapd.evaluation import held_out
from megapd.tasks import build_task
from megapd.training import build_student, start_world, student_engine
from megapd.training import train as train_run
from megapd.world import World
from tests.training.noise import Noise
from tests.training.runs import metrics

STEPS = 20
GPT = [
    "--model.kind=gpt",
    "--model.layers=2",
    "--model.hidden=32",
    "--model.heads=2",
    "--model.tied=true",
    "--task.kind=parity",
    "--task.dimension=12",
    "--task.degree=2",
    "--training.global_batch=16",
    "--training.steps=20",
    "--optimizer.lr=0.003",
]


def cases() -> dict[str, list[str]]:
    named = {f"stage{stage}": [f"--training.zero_stage={stage}"] for stage in range(4)}
    named |= {f"stage{stage}-untied": [f"--training.zero_stage={stage}", "--model.tied=false"] for stage in range(4)}
    named |= {f"stage{stage}-accumulate": [f"--training.zero_stage={stage}", "--training.micro_batch=2"] for stage in range(4)}
    named |= {f"stage{stage}-recompute": [f"--training.zero_stage={stage}", "--loss.recompute=true"] for stage in range(4)}
    named |= {f"stage{stage}-bf16": [f"--training.zero_stage={stage}", "--training.precision=bf16"] for stage in range(4)}
    named |= {f"stage{stage}-clip": [f"--training.zero_stage={stage}", "--training.clip=0.05"] for stage in range(4)}
    named |= {
        f"stage{stage}-sgd": [f"--training.zero_stage={stage}", "--optimizer.kind=sgd", "--optimizer.lr=0.1"]
        for stage in (0, 1, 3)
    }
    return named


def train(config: Config, world: World) -> dict[str, Any]:
    task = build_task(config)
    engine = student_engine(config, build_student(config, task), world)
    losses, norms, first_update = [], [], 0.0
    before = {name: tensor.double().clone() for name, tensor in engine.weights()}
    for step in range(STEPS):
        batches = [task.batch(step, rows) for rows in engine.tiling.rows(world.rank)]
        (labelled,) = world.sum(sum(b.labelled for b in batches))
        sums = sum(engine.accumulate(batch, None, labelled) for batch in batches)
        torch.distributed.all_reduce(sums)
        assert engine.step(config.optimizer.lr)
        losses.append((sums[1] / labelled).item())
        norms.append(engine.grad_norm)
        if step == 0:
            first_update = sum((tensor.double() - before[name]).abs().sum().item() for name, tensor in engine.weights())
    evaluation = held_out(task, config.evaluation.samples, world, 7, engine.evaluate)
    weights = {name: tensor.double().sum().item() for name, tensor in engine.weights()}
    engine.destroy()
    return {"losses": losses, "norms": norms, "evaluation": evaluation, "weights": weights, "first_update": first_update}


def gradient_error(config: Config, world: World) -> float:
    """Of the gradient of one global batch, relative to that of fp32 in one process."""
    task = build_task(config)
    exact = build_student(config, task)
    exact(task.batch(0, range(config.training.global_batch)), None, config.training.global_batch)[0].backward()
    engine = student_engine(config, build_student(config, task), world)
    for rows in engine.tiling.rows(world.rank):
        engine.accumulate(task.batch(0, rows), None, config.training.global_batch)
    # Stage 0 keeps it in the parameter, and the others where this function of DeepSpeed's finds it, on all ranks together.
    found = [deepspeed.utils.safe_get_full_grad(parameter).double() for parameter in engine.learner.parameters()]
    wanted = [parameter.grad.double() for parameter in exact.parameters()]
    engine.destroy()
    square = sum((one - other).square().sum().item() for one, other in zip(found, wanted, strict=True))
    return (square / sum(want.square().sum().item() for want in wanted)) ** 0.5


def skip_nonfinite(config: Config, world: World) -> dict[str, Any]:
    """One rank's loss is not finite: no rank may step, and the next step must be as if it had not been."""
    task = build_task(config)
    engine = student_engine(config, build_student(config, task), world)
    batches = [task.batch(0, rows) for rows in engine.tiling.rows(world.rank)]

    def weights() -> float:
        return sum(tensor.double().abs().sum().item() for _, tensor in engine.weights())

    before = weights()
    forward = engine.deepspeed.module.head.forward
    if world.rank == 1:

        def broken(*arguments: Any, **options: Any) -> Any:
            result = forward(*arguments, **options)
            return result._replace(loss=result.loss + torch.inf)

        engine.deepspeed.module.head.forward = broken
    for batch in batches:
        engine.accumulate(batch, None, config.training.global_batch)
        engine.deepspeed.module.head.forward = forward
    applied = engine.step(config.optimizer.lr)
    after = weights()
    for batch in batches:
        engine.accumulate(batch, None, config.training.global_batch)
    recovered = engine.step(config.optimizer.lr)
    moved = weights()
    engine.destroy()
    return {"applied": applied, "before": before, "after": after, "recovered": recovered, "moved": moved}


def data_parallel(config: Config, world: World) -> dict[str, Any]:
    """Gradients under torch's DistributedDataParallel, against those of the whole batch in one process."""
    task = build_task(config)
    learner = build_student(config, task)
    whole, part = task.batch(0, range(8)), task.batch(0, range(4 * world.rank, 4 * world.rank + 4))
    learner(whole, None, 8)[0].backward()
    wanted = [parameter.grad.clone() for parameter in learner.parameters()]
    learner.zero_grad()
    parallel = torch.nn.parallel.DistributedDataParallel(learner)
    (parallel(part, None, 8)[0] * world.size).backward()  # DDP divides the sum over ranks by their number
    pairs = zip(learner.parameters(), wanted, strict=True)
    return {
        "difference": max((p.grad - want).abs().max().item() for p, want in pairs),
        "size": max(want.abs().max().item() for want in wanted),
    }


def resumed(folder: Path, world: World, *own: str) -> dict[str, list[dict[str, Any]]]:
    """The metrics of a run whose callback has a state, without and with a stop in between."""
    for name, stops in (("whole", (None,)), ("stopped", (4, None))):
        for stop_at in stops:
            settings = ["--training.steps=10", "--telemetry={every: 1, wandb: disabled, progress: false}", *own]
            config = load(None, [*GPT, *settings, f"--runs_dir={folder}", f"--name={name}", "--evaluation.samples=16"])
            train_run(config, [Noise(stop_at)])
    return {name: metrics(folder / name) for name in ("whole", "stopped")} if world.rank == 0 else {}


def main(output: Path) -> None:
    world = start_world()
    results: dict[str, Any] = {}
    for recompute in ("false", "true"):
        config = load(None, [*GPT, f"--loss.recompute={recompute}"])
        results[f"ddp-{recompute}"] = data_parallel(config, world)
    for name, overrides in cases().items():
        results[name] = train(load(None, [*GPT, *overrides]), world)
    for stage in range(4):
        own = [*GPT, f"--training.zero_stage={stage}"]
        half = [*own, "--training.precision=bf16", "--training.micro_batch=1"]
        results[f"nonfinite{stage}"] = world.gather(skip_nonfinite(load(None, own), world))
        results[f"nonfinite{stage}-half"] = world.gather(skip_nonfinite(load(None, half), world))
        results[f"error{stage}"] = gradient_error(load(None, [*half, "--training.global_batch=64"]), world)
    results["callbacks"] = resumed(output.parent / "fp32", world, "--training.zero_stage=2")
    half = ["--training.zero_stage=1", "--training.precision=bf16", "--training.micro_batch=2"]
    results["callbacks-half"] = resumed(output.parent / "bf16", world, *half)
    if world.rank == 0:
        output.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(next(a for a in sys.argv[1:] if not a.startswith("--local_rank"))))
