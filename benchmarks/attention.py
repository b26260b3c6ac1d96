"""Documents apart by a dense mask, by FlexAttention over blocks, or not at all: tokens a second of a body's two passes.

    python benchmarks/attention.py [--kinds llama modernbert] [--lengths 512 2048 8192] [--tokens 32768] [--output FILE]

Forward and backward of a body of 12 layers, hidden 768, 12 heads, in bf16, without head and optimizer; rows packed with documents
whose lengths are drawn from a geometric distribution (mean --document tokens), --tokens a batch; in turns, medians. It says from
which length on model.attention: flex pays. Without a GPU there is no flex; --tiny: sizes for a CPU, to see that the script runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import write_result

from megapd.config import LanguageModelConfig, LlamaConfig, ModernBertConfig, TransformerConfig
from megapd.models import build_model
from megapd_kernels import LossOptions

VOCABULARY = 1024  # of an embedding that is looked up, nothing more


def section(kind: str, attention: str, *, tiny: bool) -> LanguageModelConfig:
    sizes: dict[str, Any] = {"layers": 2, "hidden": 64, "heads": 2} if tiny else {"layers": 12, "hidden": 768, "heads": 12}
    if kind == "llama":
        return LlamaConfig(**sizes, attention=attention)
    if kind == "modernbert":
        return ModernBertConfig(**sizes, attention=attention)
    return TransformerConfig(kind=kind, **sizes, attention=attention)


def packed(rows: int, length: int, document: int) -> torch.Tensor:
    """Segments [rows, length]: at each token another document begins with probability 1 / document."""
    begins = torch.rand(rows, length, generator=torch.Generator().manual_seed(0)) < 1.0 / document
    begins[:, 0] = False
    return begins.cumsum(1)


def measure(bodies: dict[str, torch.nn.Module], ids: torch.Tensor, segments: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of each way; the first two calls compile and warm up."""
    times: dict[str, list[float]] = {name: [] for name in bodies}
    for number in range(rounds + 2):
        for name, body in bodies.items():
            if ids.is_cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            body(ids, None if name == "no mask" else segments).float().square().mean().backward()
            if ids.is_cuda:
                torch.cuda.synchronize()
            if number >= 2:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(own) for name, own in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["llama", "modernbert"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--document", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "attention.json")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    device, ways = torch.device("cuda" if gpu else "cpu"), ("no mask", "sdpa", "flex") if gpu else ("no mask", "sdpa")
    found = []
    for kind in arguments.kinds:
        for length in arguments.lengths:
            segments = packed(max(1, arguments.tokens // length), length, arguments.document).to(device)
            ids = torch.randint(VOCABULARY, segments.shape, device=device)
            sizes = {"vocab_size": VOCABULARY, "classes": VOCABULARY, "length": length}
            bodies = {
                way: build_model(
                    section(kind, "flex" if way == "flex" else "sdpa", tiny=arguments.tiny),
                    **sizes,
                    options=LossOptions(),
                    seed=0,
                ).body.to(device, torch.bfloat16)
                for way in ways
            }
            seconds = measure(bodies, ids, segments, arguments.rounds)
            rates = {way: round(ids.numel() / own) for way, own in seconds.items()}
            print(f"{kind:<12} {length:>6} tokens a row  " + "  ".join(f"{way} {rate:,} tokens/s" for way, rate in rates.items()))
            found.append({"kind": kind, "length": length, "tokens_per_second": rates})
    name = torch.cuda.get_device_name() if gpu else "none"
    write_result(
        arguments.output,
        "From which length on does block-sparse attention pay?",
        arguments,
        ("torch", "megapd"),
        gpu=name,
        rows=found,
    )


if __name__ == "__main__":
    main()
