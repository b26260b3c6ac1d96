"""What the losses cost on a GPU against plain torch, torch.compile and liger-kernel, and how near they come to what must be paid.

    python benchmarks/kernels_gpu.py [--quick | --full] [--limit 480] [--output benchmarks/results/kernels.csv]
    python benchmarks/kernels_gpu.py --dry-run            lists the cases; needs no GPU

Appends one row a contestant (megapd_kernels.benchmark.contestants), operation and shape, with its status: one that runs out of
memory, is not installed or fails is a row too. The contestants that need a compiler run come last, so that --limit cuts those
first.

ms_forward, ms_forward_backward   median by CUDA events, after warm-up, the L2 cache overwritten before each repetition
peak_gb                           the allocator's peak during forward and backward, beyond the arguments; 1e9 bytes
floor_ms, percent_of_floor        the floor over ms_forward_backward (topk_logits: ms_forward). Floor of softmax_kl: 5 numbers an
                                  element (10 bytes in 16 bits: two reads of both logits, one write of the gradient) at the
                                  bandwidth of a device-to-device copy. Floor of the others: their bare matrix products, timed
                                  alone in the arguments' type: the logits, and dX and dW of the student. Both on this card, now.
error_loss, error_dx, error_dw    relative norm of the difference from the reference in float64 on the same arguments; of logits,
                                  the gradient of the first 1024 rows; of topk_logits, the log-probabilities. --no-errors on
                                  cards with slow float64

Exits with 0, with 1 where a case of megapd failed, with 2 without a GPU. Bars are printed and do not count.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.metadata
import itertools
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megapd_kernels import distillation_loss
from megapd_kernels.benchmark import contestants as peers

FIELDS = (
    *("gpu", "driver", "torch", "triton", "liger", "date", "operation", "divergence", "implementation"),
    *("BT", "V", "Ds", "Dt", "dtype", "ms_forward", "ms_forward_backward", "peak_gb", "floor_ms", "percent_of_floor"),
    *("error_loss", "error_dx", "error_dw", "status"),
)
DIVERGENCES = {
    "softmax_kl": ("forward_kl", "reverse_kl", "jsd", "tvd"),
    "linear_softmax_kl": ("forward_kl", "jsd"),
    "linear_cross_entropy": ("",),
    "linear_sparse_kl": ("forward_kl",),
    "topk_logits": ("",),
}
OURS = "megapd"
COMPILING = ("torch.compile", "liger chunked")
WARM_UP = 3
FLUSH_BYTES = 256 << 20  # the largest L2 is 126 MB (B200)
COPY_BYTES = 1 << 30
GRADIENT_ROWS = 1024
REFERENCE_BYTES = 256 << 20  # of a chunk of float64 logits; the reference holds about ten such


class Shape(NamedTuple):
    tokens: int
    vocabulary: int
    student: int
    teacher: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


QUICK = (Shape(8192, 50304, 1024, 2048), Shape(4096, 32768, 768, 1024))
DEFAULT = (
    Shape(8192, 128256, 1024, 2048),
    *QUICK,
    Shape(8192, 32768, 1024, 2048),
    Shape(16384, 128256, 2048, 4096),
)
FULL = tuple(
    itertools.starmap(
        Shape, itertools.product((4096, 8192, 16384), (32768, 50304, 128256), (768, 1024, 2048), (1024, 2048, 4096))
    )
)


class Case(NamedTuple):
    operation: str
    kind: str  # of divergence, or ""
    shape: Shape  # 0 for a width that the operation does not have
    names: tuple[str, ...]


def contestants(operation: str, kind: str) -> dict[str, Callable[[], peers.Contestant]]:
    """By name; made when called for, so that a missing package is that contestant's failure alone."""
    ours = partial(peers.megapd, operation, kind)
    found: dict[str, Callable[[], peers.Contestant]] = {OURS: ours}
    if operation.startswith("linear"):
        found["megapd recompute"] = partial(ours, recompute=True)
    found["torch"] = partial(peers.plain, operation, kind)
    found["torch.compile"] = lambda: peers.compiled(peers.plain(operation, kind))
    if operation == "softmax_kl":
        if kind == "forward_kl":
            found["liger KLDIVLoss"] = partial(peers.liger_logits, kind, kl_div=True)
        found["liger TVDLoss" if kind == "tvd" else "liger JSD"] = partial(peers.liger_logits, kind)
        found["megapd in place"] = partial(ours, in_place=True)  # overwrites its arguments: last
    if operation == "linear_softmax_kl":
        found["liger fused_linear_jsd"] = partial(peers.liger_fused_jsd, kind)
        found["liger fused_linear_jsd fp32 dW"] = partial(peers.liger_fused_jsd, kind, torch.float32)
        found["liger chunked"] = partial(peers.liger_chunked, kind, compile_chunks=True)
    if operation == "linear_cross_entropy":
        found["liger fused_linear_cross_entropy"] = peers.liger_fused_cross_entropy
        found["torch chunked"] = peers.torch_linear_cross_entropy
    return found


def plan(shapes: tuple[Shape, ...], operations: list[str]) -> list[Case]:
    """Every case once; first all that need no compiler run."""
    found: dict[Case, None] = {}
    for compiling, shape, operation in itertools.product((False, True), shapes, operations):
        student = 0 if operation in ("softmax_kl", "topk_logits") else shape.student
        teacher = shape.teacher if operation in ("linear_softmax_kl", "topk_logits") else 0
        for kind in DIVERGENCES[operation]:
            names = tuple(name for name in contestants(operation, kind) if (name in COMPILING) == compiling)
            if names:
                found[Case(operation, kind, Shape(shape.tokens, shape.vocabulary, student, teacher), names)] = None
    return list(found)


# --------------------------------------------------------------------------------------------------------- times and floors


class Card:
    """Timing on this GPU, and the floors by its own copies and products."""

    def __init__(self, dtype: torch.dtype, repetitions: int) -> None:
        self.dtype, self.repetitions = dtype, repetitions
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self.products: dict[tuple[int, int, int, str], float] = {}
        source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        self.bandwidth = 2 * COPY_BYTES / (self.milliseconds(lambda: target.copy_(source)) / 1e3)  # bytes/s, read and written

    def milliseconds(self, run: Callable[[], Any]) -> float:
        for _ in range(WARM_UP):
            run()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.repetitions)]
        for start, stop in pairs:
            self.flush.zero_()
            start.record()
            run()
            stop.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(stop) for start, stop in pairs)

    def product(self, rows: int, inner: int, columns: int, layout: str) -> float:
        """ms of [rows, inner] x [inner, columns]; layout: n or t for each operand, t: stored transposed."""
        key = (rows, inner, columns, layout)
        if key not in self.products:
            a = torch.randn(*((inner, rows) if layout[0] == "t" else (rows, inner)), dtype=self.dtype, device="cuda")
            b = torch.randn(*((columns, inner) if layout[1] == "t" else (inner, columns)), dtype=self.dtype, device="cuda")
            a, b = a.t() if layout[0] == "t" else a, b.t() if layout[1] == "t" else b
            out = torch.empty(rows, columns, dtype=self.dtype, device="cuda")
            self.products[key] = self.milliseconds(lambda: torch.mm(a, b, out=out))
            rate = 2e-9 * rows * inner * columns / self.products[key]
            print(f"  product {rows} x {inner} x {columns} {layout}: {self.products[key]:.3f} ms, {rate:.0f} TFLOP/s", flush=True)
        return self.products[key]

    def floor(self, operation: str, shape: Shape) -> float:
        """ms that the operation takes at the least."""
        n, v, d, e = shape
        if operation == "softmax_kl":
            return 5 * self.dtype.itemsize * n * v / self.bandwidth * 1e3
        teacher = self.product(n, e, v, "nt") if e else 0.0
        if operation == "topk_logits":
            return teacher
        return teacher + self.product(n, d, v, "nt") + self.product(n, v, d, "nn") + self.product(v, n, d, "tn")


# ------------------------------------------------------------------------------------------------------------------ errors


class Exact(NamedTuple):
    """value: the loss (topk_logits: the log-probabilities); gradients of the differentiable arguments, or their first rows."""

    value: Tensor
    gradients: tuple[Tensor, ...]


def exact(operation: str, kind: str, tensors: tuple[Tensor, ...]) -> Exact:
    """By the reference in float64, some rows at a time; kept in float32 for 16-bit arguments: memory is the contestants'."""
    rows = tensors[0].shape[0]
    vocabulary = tensors[0].shape[1] if operation == "softmax_kl" else tensors[1].shape[0]
    size = max(1, REFERENCE_BYTES // (8 * vocabulary))
    pieces = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    kept = torch.float64 if tensors[0].dtype == torch.float32 else torch.float32
    if operation == "topk_logits":
        hidden, weight = (t.double() for t in tensors)
        tops = [(hidden[piece] @ weight.t()).log_softmax(-1).topk(peers.TOP_K).values for piece in pieces]
        return Exact(torch.cat(tops), ())
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    if operation == "softmax_kl":
        gradient: list[Tensor] = []
        for piece in pieces:
            student = tensors[0][piece].detach().double().requires_grad_(piece.start < GRADIENT_ROWS)
            loss = _reference(kind, student, rows, teacher_logits=tensors[1][piece].double())
            total += loss.detach()
            if student.requires_grad:
                gradient += torch.autograd.grad(loss, student)
        return Exact(total, (torch.cat(gradient)[:GRADIENT_ROWS].to(kept),))
    weight = tensors[1].detach().double().requires_grad_()
    teacher_weight = tensors[3].double() if operation == "linear_softmax_kl" else weight
    dw, dx = torch.zeros_like(weight), []
    for piece in pieces:
        hidden = tensors[0][piece].detach().double().requires_grad_()
        targets: dict[str, Any]
        if operation == "linear_softmax_kl":
            targets = {"teacher_logits": tensors[2][piece].double() @ teacher_weight.t()}
        elif operation == "linear_cross_entropy":
            targets = {"labels": tensors[2][piece]}
        else:
            names = ("teacher_ids", "teacher_logprobs", "teacher_log_rest")
            targets = {name: t[piece] for name, t in zip(names, tensors[2:], strict=True)} | {"convention": "tail"}
        loss = _reference(kind, hidden @ weight.t(), rows, **targets)
        total += loss.detach()
        dh, dw_piece = torch.autograd.grad(loss, (hidden, weight))
        dx.append(dh)
        dw += dw_piece
    return Exact(total, (torch.cat(dx).to(kept), dw.to(kept)))


def _reference(kind: str, logits: Tensor, rows: int, **targets: Any) -> Tensor:
    return distillation_loss(logits, options=peers.loss_options(kind), denominator=rows, **targets).loss


def relative(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm, in float64, some rows at a time; of the first rows where fewer are expected."""
    pairs = (
        [(value, expected)] if value.dim() == 0 else zip(value[: len(expected)].split(4096), expected.split(4096), strict=True)
    )
    sums = [((v.double() - e.double()).square().sum(), e.double().square().sum()) for v, e in pairs]
    difference, size = (torch.stack(column).sum().sqrt() for column in zip(*sums, strict=True))
    return (difference / size).item()


# ------------------------------------------------------------------------------------------------------------- measurements


def measure(card: Card, contestant: peers.Contestant, tensors: tuple[Tensor, ...], wanted: Exact | None) -> dict[str, float]:
    leaves = [t for t in tensors if t.requires_grad]
    found: dict[str, float] = {}

    def forward() -> Any:
        return contestant(*tensors)

    def both() -> Any:
        result = contestant(*tensors)
        return (result, torch.autograd.grad(result, leaves)) if leaves else (result[1], ())

    value, gradients = both()
    if wanted is not None:
        found["error_loss"] = relative(value.detach(), wanted.value)
        for name, gradient, expected in zip(("error_dx", "error_dw"), gradients, wanted.gradients, strict=False):
            found[name] = relative(gradient, expected)
    del value, gradients
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    found["peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    found["ms_forward"] = card.milliseconds(forward)
    if leaves:
        found["ms_forward_backward"] = card.milliseconds(both)
    return found


def attempt(build: Callable[[], peers.Contestant], run: Callable[[peers.Contestant], dict[str, float]]) -> dict[str, Any]:
    """What was measured, and the status: ok, or why there is nothing."""
    try:
        return {**run(build()), "status": "ok"}
    except torch.OutOfMemoryError:
        return {"status": "out of memory"}
    except ImportError as error:
        return {"status": f"not installed: {error}"}
    except Exception as error:  # a peer's failure is a row; the traceback is for whoever looks into it
        traceback.print_exc()
        return {"status": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}


def rows_of(card: Card, case: Case, errors: bool) -> Iterator[dict[str, Any]]:
    """One row a contestant."""
    same = {
        "operation": case.operation,
        "divergence": case.kind,
        **dict(zip(("BT", "V", "Ds", "Dt"), case.shape, strict=True)),
        "dtype": str(card.dtype).removeprefix("torch."),
    }
    try:
        tensors = peers.make_tensors(case.operation, *case.shape, card.dtype, torch.device("cuda"))
        wanted = exact(case.operation, case.kind, tensors) if errors else None
        same["floor_ms"] = floor = card.floor(case.operation, case.shape)
    except torch.OutOfMemoryError:
        yield from ({**same, "implementation": name, "status": "out of memory before its turn"} for name in case.names)
        return
    builders = contestants(case.operation, case.kind)
    for name in case.names:
        gc.collect()  # what a failed contestant's traceback held
        torch.cuda.empty_cache()
        row = attempt(builders[name], lambda contestant: measure(card, contestant, tensors, wanted))
        milliseconds = row.get("ms_forward_backward", row.get("ms_forward"))
        if milliseconds is not None:
            row["percent_of_floor"] = 100 * floor / milliseconds
        yield {**same, "implementation": name, **row}


def machine() -> dict[str, str]:
    if torch.version.hip is None:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    else:
        driver = f"hip {torch.version.hip}"
    versions = {}
    for name, package in (("triton", "triton"), ("liger", "liger-kernel")):
        try:
            versions[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        **versions,
        "date": date.today().isoformat(),
    }


def append(path: Path, row: dict[str, Any]) -> None:
    """To the file, at once: what was measured outlives a crash. Refuses a file with other columns."""
    if path.exists():
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
        if tuple(header) != FIELDS:
            raise ValueError(f"--output: {path} has other columns; move it away or name another file")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(",".join(FIELDS) + "\n")
    with path.open("a", newline="") as file:
        csv.DictWriter(file, FIELDS, lineterminator="\n").writerow(
            {field: f"{value:.5g}" if isinstance(value, float) else value for field, value in row.items()}
        )


# ------------------------------------------------------------------------------------------------------------------ reports

COLUMNS = {
    "ms_forward": "forward",
    "ms_forward_backward": "both ms",
    "peak_gb": "GB",
    "percent_of_floor": "% floor",
    "error_loss": "loss",
    "error_dx": "dX",
    "error_dw": "dW",
}


def print_table(rows: list[dict[str, Any]]) -> None:
    def title(row: dict[str, Any]) -> str:
        sizes = ", ".join(f"{name} {row[name]}" for name in ("BT", "V", "Ds", "Dt"))
        return f"{row['operation']} {row['divergence']}".strip() + f", {sizes}, {row['dtype']}"

    for name, group in itertools.groupby(sorted(rows, key=title), title):
        print(f"\n{name}\n  {'':<34}" + "".join(f"{column:>10}" for column in COLUMNS.values()))
        for row in group:
            if row["status"] == "ok":
                cells = [f"{row[f]:>10.3g}" if f in row else " " * 10 for f in COLUMNS]
                print(f"  {row['implementation']:<34}" + "".join(cells))
            else:
                print(f"  {row['implementation']:<34}  {row['status'][:90]}")


def print_bars(rows: list[dict[str, Any]]) -> None:
    """Of the rows measured in this run."""
    groups: dict[tuple[Any, ...], dict[str, float]] = {}
    floors: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row["operation"] in ("softmax_kl", "linear_softmax_kl"):
            key = tuple(row[f] for f in ("operation", "divergence", "BT", "V", "Ds", "Dt"))
            times = groups.setdefault(key, {})
            if row["status"] == "ok":
                floors[key] = row["floor_ms"]
                times[row["implementation"]] = row["ms_forward_backward"]
    print("\nbars")
    for key, times in groups.items():
        if key[:2] == ("softmax_kl", "forward_kl"):
            least, peer = 0.8, "liger"
        elif key[0] == "linear_softmax_kl":
            least, peer = 1 / 1.3, "liger fused_linear_jsd"
        else:
            continue
        name = f"  {key[0]} {key[1]} {Shape(*key[2:])}"
        rivals = [value for other, value in times.items() if other.startswith(peer)]
        if OURS not in times:
            print(f"{name}: not measured")
            continue
        share = floors[key] / times[OURS]
        nearness = f"{100 * share:.1f} % of the floor ({1 / share:.2f}x)"
        print(f"{name}: {nearness}, at least {100 * least:.1f} %: {_verdict(share >= least)}")
        if rivals:
            faster = min(rivals) / times[OURS]
            print(f"{name}: {faster:.2f}x as fast as the fastest of {peer}, at least 2x: {_verdict(faster >= 2)}")
        else:
            print(f"{name}: against {peer}: not measured")


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help=f"the shapes {' '.join(map(str, QUICK))}")
    size.add_argument("--full", action="store_true", help="the whole grid, which takes hours; set --limit 0")
    size.add_argument("--shapes", nargs="+", metavar="BTxVxDsxDt")
    parser.add_argument("--operations", nargs="+", choices=peers.OPERATIONS, default=list(peers.OPERATIONS))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--limit", type=float, default=480.0, help="seconds after which no further case starts; 0: none")
    parser.add_argument("--no-errors", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="list the cases")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kernels.csv"))
    arguments = parser.parse_args()
    if arguments.repetitions < 1:
        parser.error(f"--repetitions: must be at least 1, got {arguments.repetitions}")
    shapes: tuple[Shape, ...] = QUICK if arguments.quick else FULL if arguments.full else DEFAULT
    if arguments.shapes:
        try:
            shapes = tuple(Shape(*map(int, text.split("x"))) for text in arguments.shapes)
        except (TypeError, ValueError):
            parser.error(f"--shapes: expected BTxVxDsxDt such as {QUICK[0]}, got {' '.join(arguments.shapes)}")
    cases = plan(shapes, arguments.operations)
    if arguments.dry_run:
        for case in cases:
            print(f"{case.operation:<21} {case.kind:<11} {case.shape!s:<24} {', '.join(case.names)}")
        print(f"{len(cases)} cases, {sum(len(case.names) for case in cases)} rows")
        return 0
    if not torch.cuda.is_available():
        print("kernels_gpu.py: needs a GPU, and torch sees none; --dry-run lists the cases without one", file=sys.stderr)
        return 2
    started, facts, rows = time.perf_counter(), machine(), []
    card = Card(getattr(torch, arguments.dtype), arguments.repetitions)
    print(f"{facts}\ncopy: {card.bandwidth / 1e12:.2f} TB/s read and written", flush=True)
    try:
        for number, case in enumerate(cases):
            if arguments.limit and time.perf_counter() - started > arguments.limit:
                print(f"{arguments.limit:g} s are over: {len(cases) - number} of {len(cases)} cases left out")
                break
            print(f"{case.operation} {case.kind} {case.shape}", flush=True)
            for row in rows_of(card, case, not arguments.no_errors):
                append(arguments.output, {**facts, **row})
                rows.append(row)
                both = row.get("ms_forward_backward", row.get("ms_forward", float("nan")))
                print(f"  {row['implementation']}: {both:.3f} ms, {row['status']}", flush=True)
            torch.cuda.synchronize()  # an illegal access spoils every later launch: end here, not with rows of its echoes
    finally:
        print_table(rows)
        print_bars(rows)
    return int(any(row["status"] != "ok" for row in rows if row["implementation"].startswith(OURS)))


if __name__ == "__main__":
    sys.exit(main())
