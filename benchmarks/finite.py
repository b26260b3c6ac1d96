"""What it costs to look for NaN in a signal: `python benchmarks/finite.py [MIB ...]`, on one thread, beside encoding the signal.

Prints milliseconds a signal of hidden states in bf16: Signal.finite, torch.isfinite(values).all(), and megapd.signals.encode.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from megapd.batch import Batch
from megapd.signals import Head, Signal, SignalSpec, encode

WIDTH, ROUNDS = 768, 9


def best(function: Callable[[], object]) -> float:
    """Milliseconds of the fastest of some calls."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times) * 1e3


def main() -> None:
    torch.set_num_threads(1)
    for mib in map(float, sys.argv[1:] or ["6", "64"]):
        rows = int(mib * 2**20) // (2 * WIDTH)
        ids = torch.zeros(1, rows, dtype=torch.int64)
        batch = Batch(ids, None, torch.arange(rows), torch.zeros(rows, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        values = torch.randn(rows, WIDTH).to(torch.bfloat16)
        signal = Signal(SignalSpec("hidden", "bf16"), "0" * 64, batch.digest, values, Head(torch.zeros(1, WIDTH), None))
        looked, plain = best(signal.finite), best(lambda values=values: bool(torch.isfinite(values).all()))
        encoded = best(lambda signal=signal, batch=batch: encode(signal, batch, 2))
        print(f"{mib:g} MiB: finite {looked:.2f} ms, isfinite {plain:.2f} ms, encode {encoded:.2f} ms")


if __name__ == "__main__":
    main()
