"""What the checks of a corpus cost: reading batches with them and without, and opening a corpus of many record batches.

    python benchmarks/batches.py [--blocks 200000] [--batches 200] [--record_batches 25000]

Both ways of reading alternate in one process on one thread, from the first batch on, at which pages of checks are held against
their digests, too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import random_corpus, write_result
from numpy.typing import NDArray

from megapd.config import load
from megapd.corpus import pack
from megapd.tasks import build_task
from megapd.tasks.blocks import Blocks

CHECKED = Blocks.read


def unchecked(blocks: Blocks, name: str, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Blocks.read as it would be without checks."""
    whole, offsets = blocks._columns[name]
    batch, within = np.divmod(rows, blocks._rows_a_batch)
    begin = offsets[batch] + within * blocks.length
    found: NDArray[np.int64] = whole[begin[:, None] + np.arange(blocks.length)].astype(np.int64)
    return found


def reading(folder: Path, style: str, blocks: int, batches: int) -> dict[str, float]:
    """Tokens a second of both ways, and the median of the pairs' ratios."""
    random_corpus(folder, blocks=blocks, length=128, vocabulary=8192, style=style)
    objective = "mlm" if style == "bert" else "clm"
    given = [f"--task={{kind: text, objective: {objective}, corpus: {folder}}}", f"--model={{kind: {style}}}"]
    task = build_task(load(None, [*given, "--training.global_batch=256"]))
    seconds: dict[str, list[float]] = {"checked": [], "unchecked": []}
    for step in range(2 * batches):
        # Another order each pair: whatever warms up does so for both.
        way = ("checked", "unchecked")[(step + step // 2) % 2]
        Blocks.read = CHECKED if way == "checked" else unchecked  # type: ignore[method-assign]
        begin = time.perf_counter()
        task.batch(step, range(256))
        seconds[way].append(time.perf_counter() - begin)
    Blocks.read = CHECKED  # type: ignore[method-assign]
    ratios = [a / b for a, b in zip(seconds["checked"], seconds["unchecked"], strict=True)]
    rates = {f"{way} Mtok/s": 256 * 128 / statistics.median(found) / 1e6 for way, found in seconds.items()}
    return {**rates, "ratio": statistics.median(ratios)}


def opening(folder: Path, record_batches: int) -> dict[str, float]:
    """Seconds to open a training split of so many record batches, of 4 blocks each, as a corpus of 100 GB has."""
    bytes_a_batch, pack.BATCH_BYTES = pack.BATCH_BYTES, 4 * 3 * 128
    random_corpus(folder, blocks=4 * record_batches, length=128, vocabulary=8192, style="gpt")
    pack.BATCH_BYTES = bytes_a_batch
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        Blocks(folder / "train.arrow")
        found.append(time.perf_counter() - begin)
    return {"record batches": record_batches, "seconds": statistics.median(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=200_000)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--record_batches", type=int, default=25_000)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/batches.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = {style: reading(folder / style, style, arguments.blocks, arguments.batches) for style in ("bert", "gpt")}
        results["opening"] = opening(folder / "opening", arguments.record_batches)
    for what, values in results.items():
        print(what, ", ".join(f"{key} {value:.3f}" for key, value in values.items()))
    write_result(arguments.output, "What do a corpus' checks cost?", arguments, ("numpy", "pyarrow"), **results)


if __name__ == "__main__":
    main()
