"""What a line of metrics costs that compares student and teacher (telemetry.statistics), beside the loss of its step.

    python benchmarks/compared.py [--positions N] [--compared M] [--output FILE]

The head's forward and backward alone, which is the loss; the same with `compared`, as at a step of which a line is written; and
with the loss's own outputs a position, which could tell most of it. In turns in one process, medians; a line is written each 10
steps unless telemetry.every says otherwise, so that a tenth of what the second takes longer is what training pays.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import torch
from common import write_result

from megapd.config import TelemetryConfig
from megapd.models import Compared, LossHead
from megapd.signals import Head, Signal, SignalSpec
from megapd_kernels import LossOptions

STUDENT, TEACHER = 256, 512  # hidden widths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=32768)
    parser.add_argument("--compared", type=int, default=TelemetryConfig().statistics)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "compared.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    hidden, labels = draw(arguments.positions, STUDENT), torch.randint(arguments.classes, (arguments.positions,))
    teacher = Head(draw(arguments.classes, TEACHER) * TEACHER**-0.5, None)
    signal = Signal(SignalSpec("hidden", "fp32"), "0" * 64, "0" * 32, draw(arguments.positions, TEACHER), teacher)
    head = LossHead(STUDENT, arguments.classes, bias=False, options=LossOptions())
    torch.nn.init.normal_(head.weight, std=STUDENT**-0.5, generator=generator)
    plain, outputs = head.options, dataclasses.replace(head.options, per_token=True)
    ways = {
        "loss": (plain, None),
        "with a line": (plain, Compared(arguments.compared)),
        "with a line at an evaluation": (plain, Compared(arguments.compared, 5)),
        "outputs a position": (outputs, None),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(arguments.rounds + 1):
        for name, (head.options, compared) in ways.items():
            own = hidden.clone().requires_grad_()
            began = time.perf_counter()
            result = head(own, labels, signal, compared=compared)
            (result if compared is None else result[0]).loss.backward()
            if number:
                times[name].append(time.perf_counter() - began)
    ratios = {name: statistics.median(a / b for a, b in zip(own, times["loss"], strict=True)) for name, own in times.items()}
    for name, ratio in ratios.items():
        print(f"{name:<30} {statistics.median(times[name]) * 1e3:9.1f} ms  {ratio:.3f}x")
    print(f"a line each 10 steps: {(ratios['with a line'] - 1) / 10:.2%} of the loss")
    question = "What does it cost to compare student and teacher at the steps of which a line is written?"
    seconds = {name: round(statistics.median(own), 4) for name, own in times.items()}
    write_result(arguments.output, question, arguments, ("torch", "megapd"), seconds=seconds, ratios=ratios)


if __name__ == "__main__":
    main()
