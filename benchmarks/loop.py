"""What megapd's loop costs over a bare DeepSpeed loop of the same model and batches.

    python benchmarks/loop.py [--steps 60] [--rounds 5] [--output benchmarks/results/loop.json]

Both train the same GPT on the same parity samples in turns, several rounds in one process; the figure is the ratio of the median
step times, per round and over all. megapd's loop runs as `megapd train` does, with its metrics, progress bar and stop checks.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import deepspeed
import torch
from common import StepTimes, write_result

from megapd.config import Config, load
from megapd.tasks import build_task
from megapd.tiling import tile
from megapd.training import build_student, deepspeed_config, parameter_groups, start_world, train

WARM_UP = 5  # steps left out of each round: allocator and thread start-up


def configuration(folder: Path, arguments: argparse.Namespace, name: str) -> Config:
    settings = {
        "name": name,
        "runs_dir": folder,
        "task.kind": "parity",
        "task.dimension": arguments.length,
        "model.kind": "gpt",
        "model.layers": arguments.layers,
        "model.hidden": arguments.hidden,
        "model.heads": 4,
        "training.steps": arguments.steps,
        "training.global_batch": arguments.batch,
        "training.zero_stage": arguments.stage,
        "telemetry.wandb": "disabled",
        "evaluation.samples": 1,
    }
    return load(None, [f"--{key}={value}" for key, value in settings.items()])


def bare(config: Config) -> list[float]:
    """Seconds a step of a loop that does nothing but forward, backward and step."""
    world = start_world()
    task = build_task(config)
    learner = build_student(config, task)
    optimizer = torch.optim.AdamW(
        parameter_groups(learner, config.optimizer.weight_decay), lr=config.optimizer.lr, betas=config.optimizer.betas
    )
    tiling = tile(config.training, world.size)
    engine, *_ = deepspeed.initialize(
        model=learner, optimizer=optimizer, config=deepspeed_config(config.training, tiling), dist_init_required=False
    )
    batches = [task.batch(step, range(tiling.micro_batch)).to(world.device) for step in range(config.training.steps)]
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        loss, _ = engine(batch, None, batch.labelled)
        engine.backward(loss)
        engine.step()
        seconds.append(time.perf_counter() - started)
    engine.destroy()
    return seconds


def megapd(config: Config) -> list[float]:
    """Seconds between the ends of consecutive updates in megapd's loop."""
    times = StepTimes()
    train(config, [times])
    return times.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("steps", 60),
        ("rounds", 5),
        ("layers", 4),
        ("hidden", 256),
        ("length", 128),
        ("batch", 8),
        ("stage", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/loop.json"))
    arguments = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(arguments.rounds):
            config = configuration(Path(temporary), arguments, f"round-{number}")
            both = {"bare": bare, "megapd": megapd}
            order = list(both) if number % 2 == 0 else list(both)[::-1]
            medians = {name: statistics.median(both[name](config)[WARM_UP:]) for name in order}
            rounds.append({**medians, "ratio": medians["megapd"] / medians["bare"]})
            print({name: round(value, 5) for name, value in rounds[-1].items()})
    ratio = statistics.median(r["ratio"] for r in rounds)
    question = "seconds a step, megapd's loop over a bare DeepSpeed loop"
    write_result(arguments.output, question, arguments, ("torch", "deepspeed"), rounds=rounds, median_ratio=ratio)
    print(f"median ratio {ratio:.4f}")


if __name__ == "__main__":
    main()
