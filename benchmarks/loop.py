"""What megapd's loop costs over a bare DeepSpeed loop of the same model and batches.

    python benchmarks/loop.py [--steps 60] [--rounds 5] [--output benchmarks/results/loop.json]

Both train the same GPT on the same parity samples in turns, several rounds in one process; the figure is the ratio of the median
step times, per round and over all. megapd's loop runs as `megapd train` does, with its metrics, progress bar and stop checks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import deepspeed
import torch

from megapd.config import Config, load
from megapd.files import write_atomic
from megapd.tasks import build_task
from megapd.training.engine import deepspeed_config, parameter_groups, start_world, tile
from megapd.training.loop import train
from megapd.training.run import build_student, start

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
    tiling = tile(config, world.size)
    engine, *_ = deepspeed.initialize(
        model=learner, optimizer=optimizer, config=deepspeed_config(config, tiling), dist_init_required=False
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
    run = start(config)
    ends: list[float] = []
    update = run.engine.step

    def timed(lr: float) -> bool:
        applied = update(lr)
        ends.append(time.perf_counter())
        return applied

    run.engine.step = timed  # type: ignore[method-assign]
    train(run)
    run.close()
    return [b - a for a, b in itertools.pairwise(ends)]


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
    result = {
        "question": "seconds a step, megapd's loop over a bare DeepSpeed loop",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
        "settings": {key: value for key, value in vars(arguments).items() if key != "output"},
        "rounds": rounds,
        "median_ratio": statistics.median(r["ratio"] for r in rounds),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.output, json.dumps(result, indent=1))
    print(f"median ratio {result['median_ratio']:.4f}")


if __name__ == "__main__":
    main()
