"""Time, memory, error and share of the floors of megapd's losses beside what else is installed, on any device.

    python -m megapd_kernels.benchmark [--operations linear_softmax_kl ...] [--divergences forward_kl ...]
        [--shapes 2048x32768x256x512 ...] [--dtypes float32 ...] [--device cpu|cuda] [--peers megapd torch ...]
        [--rounds 5] [--threads N] [--no-memory] [--csv FILE] [--json FILE]
    python -m megapd_kernels.benchmark --list

A shape is positions x classes x student's width x teacher's width. All contestants take turns in one process; time is forward and
backward, the median of the rounds, and `ratio` the median of its ratio to plain torch in the same round. Memory is what the peak
of a step takes beyond its inputs; error the relative norm of the loss' and of the worst gradient's difference from plain torch in
float64 (--no-errors: that needs the whole logits in float64); `floor` the share of the time that the bytes or the products that
must be moved would take at the rates of a copy and of a product measured here. Exits with 1 where megapd's own failed, 2 on bad
arguments.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import itertools
import json
import os
import platform
import re
import statistics
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from . import measure
from .contestants import OPERATIONS, Contestant
from .measure import Case

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")
WITHOUT = ("linear_cross_entropy", "linear_sparse_kl", "topk_logits")
PACKAGES = ("torch", "triton", "liger_kernel", "trl", "numpy")
FIELDS = (
    *("operation", "divergence", "shape", "dtype", "device", "implementation", "seconds", "fastest", "slowest", "ratio"),
    *("tokens_per_second", "extra_bytes", "error_loss", "error_gradient", "floor_seconds", "share_of_floor", "status"),
)


def main(given: list[str] | None = None) -> int:
    given = sys.argv[1:] if given is None else given
    if given[:1] == ["--count-memory"]:  # measure.peak_bytes' own process
        name, operation, divergence, n, v, d, e, dtype, device = given[1:]
        print(measure.count_memory(Case(operation, divergence, int(n), int(v), int(d), int(e), dtype, device), name))
        return 0
    arguments = parse(given)
    if arguments.list:
        show_available(arguments.device)
        return 0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    load, rows = [os.getloadavg()[0]], []
    for case in cases(arguments):
        rows += measure_case(case, arguments)
        show(case, rows)
    load.append(os.getloadavg()[0])
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    if arguments.json is not None:
        about: dict[str, Any] = {"date": date.today().isoformat(), "machine": machine(arguments.device), "load_average": load}
        about |= {"threads": torch.get_num_threads(), "rounds": arguments.rounds, "versions": versions()}
        arguments.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return 1 if any(row["implementation"].startswith("megapd") and row["status"] != "ok" for row in rows) else 0


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megapd_kernels.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = ["8192x50304x1024x2048"] if here == "cuda" else ["1024x16384x256x512"]
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=["linear_softmax_kl"])
    parser.add_argument("--divergences", nargs="+", choices=DIVERGENCES, default=["forward_kl"])
    parser.add_argument("--shapes", nargs="+", default=shapes, metavar="NxVxDxE")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16" if here == "cuda" else "float32"])
    parser.add_argument("--device", default=here, choices=("cpu", "cuda"))
    parser.add_argument("--peers", nargs="+", default=[], metavar="NAME", help="only these; --list names them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-errors", action="store_true")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--list", action="store_true", help="what can be measured here, and stop")
    arguments = parser.parse_args(given)
    if arguments.rounds < 1:
        parser.error(f"--rounds: must be at least 1, got {arguments.rounds}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no GPU here; choose cpu")
    for shape in arguments.shapes:
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", shape):
            parser.error(f"--shapes: expected positions x classes x both widths, as 1024x16384x256x512, got {shape}")
    for dtype in arguments.dtypes:
        if dtype not in ("float32", "bfloat16", "float16"):
            parser.error(f"--dtypes: {dtype} is not one of float32, bfloat16, float16")
    for path in (arguments.csv, arguments.json):
        if path is not None and not path.parent.is_dir():
            parser.error(f"--csv, --json: there is no folder {path.parent}; make it first")
    names = set().union(*(case.contestants() for case in cases(arguments)))
    for name in arguments.peers:
        if name not in names:
            parser.error(f"--peers: {name} is not one of {', '.join(sorted(names))}")
    return arguments


def cases(arguments: argparse.Namespace) -> list[Case]:
    found: dict[Case, None] = {}
    for operation, divergence, shape, dtype in itertools.product(
        arguments.operations, arguments.divergences, arguments.shapes, arguments.dtypes
    ):
        n, v, d, e = (int(size) for size in shape.split("x"))
        kind = "" if operation in WITHOUT else divergence
        found[Case(operation, kind, n, v, d, e, dtype, arguments.device)] = None
    return list(found)


def measure_case(case: Case, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a contestant; one that is not installed or fails is a row with its reason, and the others go on."""
    entries: dict[str, Contestant] = {}
    status = {name: "ok" for name in case.contestants() if not arguments.peers or name in arguments.peers}
    tensors = case.tensors()
    for name in status:
        try:
            entries[name] = case.contestants()[name]()
            measure.run_step(entries[name], tensors)  # the warm-up
        except Exception as error:
            status[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            entries.pop(name, None)
    times = measure.seconds(case, entries, arguments.rounds)
    wrong = {} if arguments.no_errors else measure.errors(case, entries)
    floor = measure.floor_seconds(case, *measure.rates(case.device, case.dtype))
    rows = []
    for name in status:
        row: dict[str, Any] = dict.fromkeys(FIELDS)
        row |= {"operation": case.operation, "divergence": case.divergence, "dtype": case.dtype, "device": case.device}
        row |= {"shape": "x".join(map(str, case[2:6])), "implementation": name, "status": status[name], "floor_seconds": floor}
        if name in entries:
            middle = statistics.median(times[name])
            row |= {"seconds": middle, "fastest": min(times[name]), "slowest": max(times[name])}
            row |= {"tokens_per_second": case.tokens / middle, "share_of_floor": floor / middle}
            if "torch" in times:
                row["ratio"] = statistics.median(a / b for a, b in zip(times[name], times["torch"], strict=True))
            if name in wrong:
                row["error_loss"], row["error_gradient"] = wrong[name]
            if not arguments.no_memory:
                row["extra_bytes"] = measure.peak_bytes(case, name)
        rows.append(row)
    return rows


def show(case: Case, rows: list[dict[str, Any]]) -> None:
    print(f"{case.operation} {case.divergence} {'x'.join(map(str, case[2:6]))} {case.dtype} on {case.device}")
    print(f"  {'':24}{'ms':>9}{'ratio':>8}{'tokens/s':>12}{'extra MiB':>11}{'loss':>9}{'gradient':>10}{'floor':>7}")
    for row in rows:
        if (row["operation"], row["divergence"], row["dtype"]) != (case.operation, case.divergence, case.dtype):
            continue
        if row["shape"] != "x".join(map(str, case[2:6])):
            continue
        if row["status"] != "ok":
            print(f"  {row['implementation']:24}{row['status']}")
            continue
        memory = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:.1f}"
        loss, gradient = ("" if row[name] is None else f"{row[name]:.1e}" for name in ("error_loss", "error_gradient"))
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        print(
            f"  {row['implementation']:24}{row['seconds'] * 1e3:9.2f}{ratio:>8}{row['tokens_per_second']:12.0f}{memory:>11}"
            f"{loss:>9}{gradient:>10}{row['share_of_floor']:7.0%}"
        )
    print(flush=True)


def show_available(device: str) -> None:
    print("versions: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    for operation in OPERATIONS:
        for divergence in ("",) if operation in WITHOUT else DIVERGENCES:
            names = Case(operation, divergence, 1, 1, 1, 1, "float32", device).contestants()
            print(f"{operation} {divergence}: {', '.join(names)}")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} processors"


if __name__ == "__main__":
    sys.exit(main())
