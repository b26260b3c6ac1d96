"""What the linear losses cost on a CPU, forward and backward, against plain torch on whole logits and what others do.

    python benchmarks/kernels_cpu.py [--rounds 7] [--operations linear_softmax_kl ...] [--chunk-bytes 16777216 ...]
                                     [--output benchmarks/results/kernels_cpu.json]

Time: all contestants (megapd_kernels.benchmark.contestants) take turns in one process, in a rotated and reversed order; the
figure is the median over the rounds of the ratio to plain torch in the same round. Memory: each runs alone in a fresh process,
once to warm up and once counted: the peak of the resident set above where it stood with the inputs made; the gradients count.
Linux only, where a process can reset its own peak (/proc/self/clear_refs). Bars, for linear_softmax_kl at the default sizes:
time <= 1.0 and extra memory <= 1/8 of plain torch's.

A chunk's passes over its rows are many short parallel regions: where another process has one of the processors, each waits for
its slowest thread, and the ratio says nothing. Then take --threads 1; the result holds the load at start and end.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import importlib.util
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
from typing import Any

import torch
from torch import Tensor

from megapd.files import write_atomic
from megapd_kernels.benchmark import contestants as peers

OPERATIONS = ("linear_softmax_kl", "linear_cross_entropy", "linear_sparse_kl")
PLAIN, OURS = "torch", "megapd"
TIME_BAR, MEMORY_BAR = 1.0, 1 / 8
# torchtune's loss lacks the teacher's entropy.
OTHER_LOSS = ("torchtune-like",)


def contestants(operation: str, chunk_bytes: list[int], only: list[str]) -> dict[str, Callable[[], peers.Contestant]]:
    """By name, plain torch first; each is made when it is first called for: compiling takes a while, importing memory."""
    kind = "forward_kl"
    found: dict[str, Callable[[], peers.Contestant]] = {
        PLAIN: lambda: peers.plain(operation, kind),
        OURS: lambda: peers.megapd(operation, kind),
        "megapd recompute": lambda: peers.megapd(operation, kind, recompute=True),
        "torch.compile": lambda: peers.compiled(peers.plain(operation, kind)),
    }
    for size in chunk_bytes:
        found[f"megapd {size / 2**20:.4g} MiB"] = partial(peers.megapd, operation, kind, chunk_bytes=size)
    if operation == "linear_softmax_kl":
        found["torchtune-like"] = lambda: peers.torchtune_like
        found["liger-like"] = lambda: peers.LigerLike.apply
        if importlib.util.find_spec("liger_kernel") is not None:
            found["liger chunked"] = lambda: peers.liger_chunked(kind, compile_chunks=False)
    if operation == "linear_cross_entropy" and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["torch chunked"] = peers.torch_linear_cross_entropy
    return {name: build for name, build in found.items() if name == PLAIN or not only or name in only}


def make(arguments: argparse.Namespace, operation: str) -> tuple[Tensor, ...]:
    return peers.make_tensors(
        operation,
        arguments.tokens,
        arguments.vocabulary,
        arguments.student,
        arguments.teacher,
        torch.float32,
        torch.device("cpu"),
    )


def step(contestant: peers.Contestant, tensors: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, and its gradients."""
    loss = contestant(*tensors)
    return loss.detach(), torch.autograd.grad(loss, [t for t in tensors if t.requires_grad])


def relative(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


def measure_time(arguments: argparse.Namespace, operation: str) -> dict[str, Any]:
    tensors = make(arguments, operation)
    entries = {name: build() for name, build in contestants(operation, arguments.chunk_bytes, arguments.contestants).items()}
    expected_loss, expected = step(entries[PLAIN], tensors)
    differences = {}
    for name, contestant in entries.items():  # the warm-up too
        loss, gradients = step(contestant, tensors)
        differences[name] = {
            "gradients": max(relative(g, e) for g, e in zip(gradients, expected, strict=True)),
            "loss": None if name in OTHER_LOSS else relative(loss, expected_loss),
        }
    del expected, gradients
    rounds = []
    for number in range(arguments.rounds):
        names = list(entries)
        turn = number // 2 % len(names)
        order = names[turn:] + names[:turn]
        seconds = {}
        for name in order if number % 2 == 0 else order[::-1]:
            started = time.perf_counter()
            step(entries[name], tensors)
            seconds[name] = time.perf_counter() - started
        rounds.append({name: seconds[name] for name in names})
        print(f"  round {number + 1}: " + ", ".join(f"{name} {value:.2f} s" for name, value in rounds[-1].items()), flush=True)
    return {
        name: {
            "seconds": statistics.median(r[name] for r in rounds),
            "ratio": statistics.median(r[name] / r[PLAIN] for r in rounds),
            "rounds": [round(r[name], 4) for r in rounds],
            "ratios": [round(r[name] / r[PLAIN], 4) for r in rounds],
            "difference_from_torch": differences[name],
        }
        for name in entries
    }


def status_bytes(key: str) -> int:
    """A size out of /proc/self/status, such as VmRSS, now, or VmHWM, the largest since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}; memory is measured on Linux alone: leave it out with --no-memory")


def count_memory(arguments: argparse.Namespace, operation: str, name: str) -> int:
    """Peak bytes above those that stood with the inputs made, in this process. The loss and gradients are alive at the end."""
    contestant, tensors = contestants(operation, arguments.chunk_bytes, arguments.contestants)[name](), make(arguments, operation)
    step(contestant, tensors)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    results = step(contestant, tensors)
    peak = status_bytes("VmHWM")
    assert all(g.isfinite().all() for g in results[1])
    return peak - before


def measure_memory(arguments: argparse.Namespace, operation: str) -> dict[str, int]:
    """Each contestant in its own process. With a fixed threshold whatever exceeds 64 KiB goes back to the system when freed."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    found = {}
    for name in contestants(operation, arguments.chunk_bytes, arguments.contestants):
        command = [sys.executable, __file__, *sys.argv[1:], "--count-memory", operation, name]
        output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        found[name] = int(output.splitlines()[-1])
    return found


def report(operation: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"{operation:<22}{'seconds':>10}{'ratio':>8}{'extra MiB':>11}{'ratio':>8}{'gradients':>11}")
    for name, row in rows.items():
        memory = (row["extra_bytes"] / 2**20, row["extra_ratio"]) if "extra_bytes" in row else (float("nan"),) * 2
        difference = row["difference_from_torch"]["gradients"]
        print(f"  {name:<20}{row['seconds']:>10.3f}{row['ratio']:>8.3f}{memory[0]:>11.1f}{memory[1]:>8.3f}{difference:>11.1e}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 7), ("tokens", 2048), ("vocabulary", 32768), ("student", 256), ("teacher", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--chunk-bytes", type=int, nargs="+", default=[], help="more contestants: megapd with these chunk sizes")
    parser.add_argument("--contestants", nargs="+", default=[], metavar="NAME", help="only these beside plain torch; default all")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument(
        "--count-memory", nargs=2, metavar=("OPERATION", "NAME"), help="print one contestant's extra bytes, no more"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kernels_cpu.json"))
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds: must be at least 1, got {arguments.rounds}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.count_memory:
        print(count_memory(arguments, *arguments.count_memory))
        return 0
    results: dict[str, dict[str, dict[str, Any]]] = {}
    load = [os.getloadavg()[0]]
    for operation in arguments.operations:
        print(operation, flush=True)
        rows = measure_time(arguments, operation)
        if not arguments.no_memory:
            memory = measure_memory(arguments, operation)
            for name, extra in memory.items():
                rows[name] |= {"extra_bytes": extra, "extra_ratio": extra / memory[PLAIN]}
        report(operation, rows)
        results[operation] = rows
    load.append(os.getloadavg()[0])
    bars: dict[str, dict[str, Any]] = {}
    if OURS in results.get(OPERATIONS[0], {}):
        ours = results[OPERATIONS[0]][OURS]
        sizes = f"{arguments.tokens} x {arguments.vocabulary}, {arguments.student} and {arguments.teacher} wide"
        for name, value, bar in (("time", ours["ratio"], TIME_BAR), ("memory", ours.get("extra_ratio"), MEMORY_BAR)):
            bars[name] = {"ratio": value, "bar": bar, "met": None if value is None else value <= bar}
            verdict = "not measured" if value is None else f"{value:.3f}: {'met' if value <= bar else 'missed'}"
            print(f"{OPERATIONS[0]}, {sizes}: {name} at most {bar:g} of plain torch's: {verdict}")
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if importlib.util.find_spec("liger_kernel") is not None:
        versions["liger-kernel"] = importlib.metadata.version("liger-kernel")
    result = {
        "question": "seconds and extra bytes of the linear losses, forward and backward, over plain torch on whole logits",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads",
        "load_average": load,
        "versions": versions,
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("output", "count_memory")},
        "results": results,
        "bars": bars,
    }
    write_atomic(arguments.output, json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
