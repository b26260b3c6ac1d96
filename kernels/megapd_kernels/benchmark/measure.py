"""Time, memory, error and floors of contestants on one operation's arguments."""

from __future__ import annotations

import ctypes
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import contestants as made
from .contestants import Contestant

COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
PRODUCT = {"cpu": 1024, "cuda": 8192}


class Case(NamedTuple):
    """Sizes N, V, D, E; divergence "" where the operation has none."""

    operation: str
    divergence: str
    tokens: int
    vocabulary: int
    student: int
    teacher: int
    dtype: str
    device: str

    def tensors(self) -> tuple[Tensor, ...]:
        dtype: torch.dtype = getattr(torch, self.dtype)
        sizes = (self.tokens, self.vocabulary, self.student, self.teacher)
        return made.make_tensors(self.operation, *sizes, dtype, torch.device(self.device))

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        return made.available(self.operation, self.divergence, torch.device(self.device))


def run_step(contestant: Contestant, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The loss and its gradients; of topk_logits the ids' log probabilities."""
    leaves = [t for t in tensors if t.requires_grad]
    out = contestant(*tensors)
    if not leaves:
        return [out[1]]
    return [out.detach(), *torch.autograd.grad(out, leaves)]


def seconds(case: Case, entries: dict[str, Contestant], rounds: int) -> dict[str, list[float]]:
    """Of each contestant in each round, all in turns, in a rotated and reversed order."""
    tensors, names = case.tensors(), list(entries)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number // 2 % max(1, len(names))
        order = names[turn:] + names[:turn]
        for name in order if number % 2 == 0 else order[::-1]:
            synchronize(case.device)
            started = time.perf_counter()
            run_step(entries[name], tensors)
            synchronize(case.device)
            found[name].append(time.perf_counter() - started)
    return found


def errors(case: Case, entries: dict[str, Contestant]) -> dict[str, tuple[float, float]]:
    """Relative norms of the loss' and of the worst gradient's difference from plain torch in float64, on the same arguments."""
    tensors = case.tensors()
    wide = tuple(t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors)
    wanted = run_step(reference(case), wide)
    found = {}
    for name, contestant in entries.items():
        each = [relative(value, want) for value, want in zip(run_step(contestant, tensors), wanted, strict=True)]
        found[name] = (each[0], max(each[1:], default=0.0))
    return found


def reference(case: Case) -> Contestant:
    """Plain torch that keeps float64: the contestant "torch" computes its softmax in float32."""
    plain = made.plain(case.operation, case.divergence)

    def run(*tensors: Tensor) -> object:
        kept = Tensor.float
        Tensor.float = lambda self: self  # type: ignore[assignment, method-assign, return-value]
        try:
            return plain(*tensors)
        finally:
            Tensor.float = kept  # type: ignore[method-assign]

    return run


def relative(value: Tensor, wanted: Tensor) -> float:
    return float((value.double() - wanted).norm() / wanted.norm().clamp(min=1e-300))


def peak_bytes(case: Case, name: str) -> int:
    """Extra bytes at the peak of a step, the gradients counted. CUDA: of the allocator; else of its own process, on Linux."""
    if case.device == "cuda":
        tensors, contestant = case.tensors(), case.contestants()[name]()
        run_step(contestant, tensors)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_step(contestant, tensors)
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, "-m", "megapd_kernels.benchmark", "--count-memory", name, *map(str, case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return int(done.stdout.splitlines()[-1])


def count_memory(case: Case, name: str) -> int:
    """In this process alone: the peak of the resident set above where it stood with the inputs made."""
    contestant, tensors = case.contestants()[name](), case.tensors()
    run_step(contestant, tensors)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    kept = run_step(contestant, tensors)
    peak = _status("VmHWM") - before
    assert all(t.numel() > 0 for t in kept), "the gradients are alive at the peak"
    return peak


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}: memory is counted on Linux and CUDA; --no-memory leaves it out")


def floor_seconds(case: Case, bandwidth: float, rate: float) -> float:
    """What must be paid: softmax_kl reads both logits twice and writes a gradient; the others multiply, the student's head three
    times (logits, dX, dW), topk_logits' and a teacher's once."""
    n, v, d, e = case.tokens, case.vocabulary, case.student, case.teacher
    itemsize: int = getattr(torch, case.dtype).itemsize
    if case.operation == "softmax_kl":
        return 5 * n * v * itemsize / bandwidth
    if case.operation == "topk_logits":
        return 2 * n * v * e / rate
    teacher = 2 * n * v * e if case.operation == "linear_softmax_kl" else 0
    return (6 * n * v * d + teacher) / rate


def rates(device: str, dtype: str) -> tuple[float, float]:
    """(bytes a second of a copy, read and written; operations a second of a square product in `dtype`), here and now."""
    kind, size = getattr(torch, dtype), PRODUCT[device]
    source = torch.zeros(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    copy = _median(lambda: target.copy_(source), device)
    return 2 * source.numel() / copy, 2 * size**3 / _median(lambda: a @ b, device)


def _median(call: Callable[[], object], device: str) -> float:
    found = []
    for _ in range(7):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found[2:])


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
