"""What the step that changes teachers costs, when the next checkpoint is known a window ahead and when it is read on the spot.

    python benchmarks/rotation.py [--steps 72] [--every 8] [--rounds 3] [--output benchmarks/results/rotation.json]

A GPT student on parity with a co-located teacher that rotates every `every` steps, in turns: `prepared` as megapd does it,
`blocking` with the reload inside the step. Times are from the end of an update to the end of the next. For each: the median of
the steps that rotate, and of those that do not with their quartiles, which are the noise.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from common import StepTimes, write_result

from megapd.config import Config, load
from megapd.tasks import build_task
from megapd.teacher.stream import ColocatedStream
from megapd.training import Callback, Run, Teaching, build_student, checkpoint_config, train
from megapd.trajectory import Checkpoint
from megapd.trajectory.writer import write_checkpoint

WARM_UP = 3  # steps left out of each round: allocator and thread start-up


class BlockingStream(ColocatedStream):
    """Reads a checkpoint when its first step comes."""

    def teacher(self, step: int) -> Checkpoint:
        return self._teacher.rotate(self._plan.checkpoint_at(step))


class Blocking(Callback):
    """Puts a BlockingStream in the place of the run's."""

    def start(self, run: Run) -> None:
        assert isinstance(run.teaching, Teaching)
        stream = run.teaching.stream
        assert isinstance(stream, ColocatedStream)
        run.teaching.stream = BlockingStream(stream._teacher, run.teaching.plan, stream.spec)


def settings(arguments: argparse.Namespace, folder: Path) -> list[str]:
    return [
        "--task.kind=parity",
        f"--task.dimension={arguments.length}",
        f"--runs_dir={folder}",
        f"--training.steps={arguments.steps}",
        f"--training.global_batch={arguments.batch}",
        "--telemetry={wandb: disabled, progress: false, every: 1000}",
        "--evaluation.samples=1",
    ]


def write_teachers(arguments: argparse.Namespace, folder: Path) -> int:
    """Checkpoints at every `every` steps; the bytes of one."""
    model = f"--model={{kind: gpt, layers: {arguments.teacher_layers}, hidden: {arguments.teacher_hidden}, heads: 8}}"
    config = load(None, [*settings(arguments, folder), model])
    task = build_task(config)
    learner = build_student(config, task)
    for step in range(arguments.every, arguments.steps + 1, arguments.every):
        with torch.no_grad():
            for parameter in learner.parameters():
                parameter.mul_(1.01)
        write_checkpoint(
            folder / "trajectory",
            step,
            learner.named_parameters(),
            config=checkpoint_config(config, task),
            vocabulary=task.vocabulary_digest,
            metrics={},
            shard_bytes=64 << 20,
        )
    return sum(p.numel() * 4 for p in learner.parameters())


def student(arguments: argparse.Namespace, folder: Path, name: str) -> Config:
    model = f"--model={{kind: gpt, layers: {arguments.layers}, hidden: {arguments.hidden}, heads: 4}}"
    teacher = [
        f"--teacher.trajectory={folder / 'trajectory'}",
        "--schedule.policy=matched",
        f"--schedule.refresh={arguments.every}",
    ]
    return load(None, [*settings(arguments, folder), model, *teacher, f"--name={name}"])


def measure(config: Config, every: int, *, blocking: bool) -> dict[str, float]:
    times = StepTimes()
    train(config, [times, *([Blocking()] if blocking else [])])
    seconds = list(enumerate(times.seconds, start=1))[WARM_UP:]
    turns = [value for step, value in seconds if step % every == 0]
    others = [value for step, value in seconds if step % every]
    low, _, high = statistics.quantiles(others, n=4)
    return {"rotating": statistics.median(turns), "other": statistics.median(others), "other_low": low, "other_high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("steps", 72),
        ("every", 8),
        ("rounds", 3),
        ("layers", 4),
        ("hidden", 256),
        ("teacher-layers", 8),
        ("teacher-hidden", 512),
        ("length", 64),
        ("batch", 4),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/rotation.json"))
    arguments = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = write_teachers(arguments, folder)
        for number in range(arguments.rounds):
            names = ["prepared", "blocking"][:: 1 if number % 2 == 0 else -1]
            found = {}
            for name in names:
                config = student(arguments, folder, f"{name}-{number}")
                found[name] = measure(config, arguments.every, blocking=name == "blocking")
            rounds.append(found)
            print({name: {key: round(value, 4) for key, value in found[name].items()} for name in sorted(found)}, flush=True)
    extra = {name: statistics.median(r[name]["rotating"] / r[name]["other"] for r in rounds) for name in ("prepared", "blocking")}
    question = "seconds of the step that rotates over those of a step that does not"
    write_result(arguments.output, question, arguments, ("torch", "deepspeed"), teacher_bytes=size, rounds=rounds, ratio=extra)
    print(f"a step that rotates / one that does not, checkpoint of {size / 1e6:.0f} MB: {extra}")


if __name__ == "__main__":
    main()
