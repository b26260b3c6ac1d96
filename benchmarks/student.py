"""The student's half of benchmarks/stream.py: one GPT, and what its step costs with each way to bring it signals."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import StepTimes, random_corpus
from prepared import STEP, PreparedServer, Sizes, cut, make_signal

from megapd.batch import Batch
from megapd.config import Config, load
from megapd.signals import Signal
from megapd.tasks import build_task
from megapd.teacher.stream import Stream
from megapd.training import Callback, Run, Teaching, build_student, checkpoint_config, train
from megapd.trajectory import Checkpoint
from megapd.trajectory.writer import write_checkpoint

WARM_UP = 3  # steps left out of each run: allocator and thread start-up
COLOCATED_STEPS = 8  # of a run whose steps are several times as long
# What each variant adds to the student: nothing, the loss, the loss and a teacher's forward pass, the loss and a carrier.
VARIANTS = ("labels", "free", "colocated", "served", "shared_memory")
BLOCKS = 512


class FreeStream:
    """Signals that are there already: what they cost is the loss alone."""

    def __init__(self, source: Stream, signal: Signal) -> None:
        self.spec = source.spec
        self._checkpoint, self._signal = source.teacher(0), signal

    def ready(self, step: int) -> bool:
        return True

    def teacher(self, step: int) -> Checkpoint:
        return self._checkpoint

    def request(self, step: int, batches: Sequence[Batch]) -> None: ...

    def signals(self, step: int, batches: Sequence[Batch]) -> Iterator[Signal]:
        return (cut(self._signal, batch) for batch in batches)

    def close(self) -> None: ...


class Free(Callback):
    """Puts a FreeStream in the place of the run's."""

    def __init__(self, sizes: Sizes, positions: int) -> None:
        self._sizes, self._positions = sizes, positions

    def start(self, run: Run) -> None:
        assert isinstance(run.teaching, Teaching)
        stream = run.teaching.stream
        signal = make_signal(stream.spec, self._sizes, self._positions, stream.teacher(0).digest)
        run.teaching.stream = FreeStream(stream, signal)
        stream.close()


class Costs(Callback):
    """own, other: CPU seconds of this process and of the server, from the run's start to its close."""

    def __init__(self, server: PreparedServer) -> None:
        self._server = server

    def start(self, run: Run) -> None:
        self.own, self.other = -time.process_time(), -self._server.cpu_seconds()

    def close(self) -> None:
        self.own += time.process_time()
        self.other += self._server.cpu_seconds()


def settings(arguments: argparse.Namespace, folder: Path, name: str, steps: int) -> list[str]:
    return [
        f"--name={name}",
        f"--runs_dir={folder}",
        "--task.kind=text",
        "--task.objective=clm",
        f"--task.corpus={folder / 'corpus'}",
        f"--training.steps={steps}",
        f"--training.global_batch={arguments.batch}",
        "--telemetry={wandb: disabled, progress: false, every: 1000}",
        "--evaluation.samples=1",
        "--optimizer.lr=1e-5",
    ]


def gpt(layers: int, hidden: int) -> str:
    return f"--model={{kind: gpt, layers: {layers}, hidden: {hidden}, heads: {max(1, hidden // 64)}}}"


def write_teacher(arguments: argparse.Namespace, folder: Path) -> int:
    """An untrained teacher as a trajectory of one checkpoint; its parameters."""
    config = load(None, [*settings(arguments, folder, "teacher", 1), gpt(arguments.teacher_layers, arguments.teacher_hidden)])
    task = build_task(config)
    learner = build_student(config, task)
    write_checkpoint(
        folder / "trajectory",
        STEP,
        learner.named_parameters(),
        config=checkpoint_config(config, task),
        vocabulary=task.vocabulary_digest,
        metrics={},
        shard_bytes=256 << 20,
    )
    return sum(p.numel() for p in learner.parameters())


def student(arguments: argparse.Namespace, folder: Path, variant: str, name: str, port: int) -> Config:
    steps = min(arguments.steps, COLOCATED_STEPS) if variant == "colocated" else arguments.steps
    given = [*settings(arguments, folder, name, steps), gpt(arguments.layers, arguments.hidden)]
    if variant != "labels":
        given += [f"--teacher.trajectory={folder / 'trajectory'}", "--schedule.policy=one_shot"]
    if variant in ("served", "shared_memory"):
        given += [f"--teacher.carrier={variant}", f"--teacher.endpoints=[grpc://127.0.0.1:{port}]"]
    return load(None, given)


def measure(
    arguments: argparse.Namespace, folder: Path, variant: str, name: str, server: PreparedServer, sizes: Sizes
) -> dict[str, float]:
    costs, times = Costs(server), StepTimes()
    config = student(arguments, folder, variant, name, server.ports["plain"])
    train(config, [*([Free(sizes, arguments.batch * sizes.length)] if variant == "free" else []), costs, times])
    steps = config.training.steps
    own, other = costs.own / steps, costs.other / steps
    return {"seconds": statistics.median(times.seconds[WARM_UP:]), "cpu_seconds": own, "server_cpu_seconds": other}


def measure_students(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    sizes = Sizes(arguments.classes, arguments.teacher_hidden, arguments.length)
    random_corpus(folder / "corpus", blocks=BLOCKS, length=sizes.length, vocabulary=sizes.classes, style="gpt")
    parameters = write_teacher(arguments, folder)
    server = PreparedServer(sizes, folder / "trajectory")
    rounds: list[dict[str, dict[str, float]]] = []
    try:
        for number in range(arguments.rounds):
            turn = number % len(VARIANTS)
            found = {}
            for variant in VARIANTS[turn:] + VARIANTS[:turn]:
                found[variant] = measure(arguments, folder, variant, f"{variant}-{number}", server, sizes)
            rounds.append(found)
            print({name: round(found[name]["seconds"], 4) for name in VARIANTS}, flush=True)
    finally:
        server.close()
    table = {}
    for variant in VARIANTS:
        medians = {key: statistics.median(found[variant][key] for found in rounds) for key in rounds[0][variant]}
        table[variant] = {
            **medians,
            "samples_per_second": arguments.batch / medians["seconds"],
            "tokens_per_second": arguments.batch * arguments.length / medians["seconds"],
            "over_free": statistics.median(found[variant]["seconds"] / found["free"]["seconds"] for found in rounds),
        }
        row = table[variant]
        print(
            f"{variant:14} {row['seconds']:.4f} s a step {row['samples_per_second']:6.1f} samples/s"
            f" {row['tokens_per_second']:8,.0f} tokens/s  {row['over_free']:.3f} of free;"
            f" CPU {row['cpu_seconds']:.3f} s + {row['server_cpu_seconds']:.4f} s",
            flush=True,
        )
    return {"teacher_parameters": parameters, "table": table, "rounds": rounds}
