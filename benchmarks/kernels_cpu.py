"""The fused linear losses on a CPU: time and memory against plain torch and against what other projects do.

    python benchmarks/kernels_cpu.py [--rounds 7] [--threads 2] [--operations linear_softmax_kl ...] [--output FILE]

Forward and backward in float32, every contestant once a round, in an order that rotates; the ratio is taken within a round, the
figure is its median. Extra memory is the growth of a fresh process's peak resident size over a first call, with the arguments in
place and the allocator told to return what is freed. liger-kernel's own class runs where that package is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import peers
import torch
from torch import Tensor

from megapd.files import write_atomic

MIB = 2**20
KIND = "forward_kl"


def contestants(operation: str, chunk_bytes: int | None) -> dict[str, Callable[[], peers.Contestant]]:
    """Name -> what makes the contestant; plain torch, that the others are measured against, is the first."""
    found: dict[str, Callable[[], peers.Contestant]] = {
        "torch": partial(peers.plain, operation, KIND),
        "megapd": partial(peers.megapd, operation, KIND, chunk_bytes=chunk_bytes),
        "megapd recompute": partial(peers.megapd, operation, KIND, chunk_bytes=chunk_bytes, recompute=True),
        "torch.compile": lambda: peers.compiled(peers.plain(operation, KIND)),
    }
    if operation == "linear_softmax_kl":
        found["torchtune-like"] = lambda: peers.torchtune_like
        found["liger-like"] = lambda: peers.LigerLike.apply
        found["liger-kernel chunked"] = partial(peers.liger_chunked, KIND, compile_chunks=False)
    if operation == "linear_cross_entropy":
        found["torch linear_cross_entropy"] = peers.torch_linear_cross_entropy
    return found


def tensors(arguments: argparse.Namespace, operation: str) -> tuple[Tensor, ...]:
    sizes = (arguments.tokens, arguments.vocabulary, arguments.student, arguments.teacher)
    return peers.make_tensors(operation, *sizes, torch.float32, torch.device("cpu"))


def step(contestant: peers.Contestant, inputs: tuple[Tensor, ...]) -> tuple[float, list[Tensor]]:
    """(seconds of forward and backward, gradients)."""
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    started = time.perf_counter()
    gradients = torch.autograd.grad(contestant(*inputs), leaves)
    return time.perf_counter() - started, list(gradients)


def timings(arguments: argparse.Namespace, operation: str, names: list[str]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds a round of each contestant, and its gradients' relative distance from plain torch's."""
    inputs, ready, distances, wanted = tensors(arguments, operation), {}, {}, None
    for name in names:
        ready[name] = contestants(operation, arguments.chunk_bytes)[name]()
        _, gradients = step(ready[name], inputs)  # compiles, and fills the allocator
        wanted = gradients if wanted is None else wanted
        pairs = zip(gradients, wanted, strict=True)
        distances[name] = max(((got - want).norm() / want.norm()).item() for got, want in pairs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(step(ready[name], inputs)[0])
    return seconds, distances


def peak(arguments: argparse.Namespace, operation: str, name: str) -> int:
    """Bytes by which a fresh process grows over a first call."""
    command = [sys.executable, __file__, "--alone", operation, name, "--threads", str(arguments.threads)]
    for option in ("tokens", "vocabulary", "student", "teacher", "chunk_bytes"):
        value = getattr(arguments, option)
        if value is not None:
            command += [f"--{option.replace('_', '-')}", str(value)]
    # Large blocks straight from the system and back: resident size then follows what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    return int(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def alone(arguments: argparse.Namespace) -> None:
    operation, name = arguments.alone
    warm = argparse.Namespace(**{**vars(arguments), "tokens": 8, "vocabulary": 512})
    contestant = contestants(operation, arguments.chunk_bytes)[name]()
    step(contestant, tensors(warm, operation))  # code and thread pools, which are no part of the question
    if name == "torch.compile":
        contestant = contestants(operation, arguments.chunk_bytes)[name]()
    inputs = tensors(arguments, operation)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now: proc(5)
    before = peak_resident()
    step(contestant, inputs)
    print(peak_resident() - before)


def peak_resident() -> int:
    """Bytes; the kernel's high-water mark."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def available(operation: str, chunk_bytes: int | None) -> tuple[list[str], dict[str, str]]:
    """(names that can run here, why others cannot)."""
    names, missing = [], {}
    for name, make in contestants(operation, chunk_bytes).items():
        try:
            make()
            names.append(name)
        except ImportError as error:
            missing[name] = str(error)
    return names, missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    operations = ["linear_softmax_kl", "linear_cross_entropy", "linear_sparse_kl"]
    parser.add_argument("--operations", nargs="+", default=operations, choices=operations)
    sizes = {"rounds": 7, "tokens": 2048, "vocabulary": 32768, "student": 256, "teacher": 512, "threads": os.cpu_count() or 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunk-bytes", type=int)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kernels_cpu.json"))
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.alone:
        alone(arguments)
        return 0
    results = {}
    for operation in arguments.operations:
        names, missing = available(operation, arguments.chunk_bytes)
        seconds, distances = timings(arguments, operation, names)
        memory = {name: peak(arguments, operation, name) for name in names}
        print(f"{operation}: {arguments.tokens} x {arguments.vocabulary}, Ds {arguments.student}, Dt {arguments.teacher}")
        rows = {}
        for name in names:
            ratios = [own / plain for own, plain in zip(seconds[name], seconds["torch"], strict=True)]
            rows[name] = {
                "seconds": [round(value, 4) for value in seconds[name]],
                "time_ratio": round(statistics.median(ratios), 3),
                "time_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
                "extra_mib": round(memory[name] / MIB, 1),
                "memory_ratio": round(memory[name] / memory["torch"], 4),
                "gradient_distance": distances[name],
            }
            print(
                f"  {name:28} {statistics.median(seconds[name]):7.3f} s  {rows[name]['time_ratio']:6.3f}x"
                f"  {memory[name] / MIB:8.1f} MiB  {rows[name]['memory_ratio']:7.4f}x  gradients {distances[name]:.1e}"
            )
        for name, why in missing.items():
            print(f"  {name:28} not here: {why}")
        results[operation] = {"contestants": rows, "missing": missing}
        fast, small = rows["megapd"]["time_ratio"] <= 1.0, rows["megapd"]["memory_ratio"] <= 1 / 8
        print(f"  time <= 1.0x of torch: {'met' if fast else 'MISSED'}; extra memory <= 1/8: {'met' if small else 'MISSED'}")
    settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "alone")}
    head = {
        "question": "forward and backward of the fused linear losses on a CPU, against plain torch",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads",
        "versions": {"torch": torch.__version__},
        "settings": settings,
    }
    write_atomic(arguments.output, json.dumps({**head, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
