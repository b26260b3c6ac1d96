"""Training throughput on one GPU: labels only, distilled by a co-located teacher, and a plain transformers + torch loop.

    python benchmarks/train_gpu.py [--tiny] [--limit 400] [--output benchmarks/results/train_gpu.json]

The corpus is random ids: no figure here says anything about learning. Each run is `megapd.train` in this process, bf16 under
ZeRO-1, AdamW, held-out loss off but for one sample at the end; the plain loop is transformers' model under bf16 autocast with
fp32 weights and torch's fused AdamW, attention by SDPA. --tiny: sizes for a CPU, to see that the script runs.

step_seconds        median over windows of --window steps, the device synchronised at their ends only, after --warm-up steps
tokens_per_second   global batch x length over it
mfu                 model's FLOPs (megapd.config, flops_per_token) a second over the vendor's dense bf16 peak; of the student
                    alone: a distilled run's teacher counts as nothing
peak_gb             the allocator's peak, 1e9 bytes

A case that fails is on record with its error, the others go on; exits with 1 then. --limit: seconds after which no case is begun.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import random_corpus, write_result

from megapd.config import Config, load
from megapd.tasks import build_task
from megapd.training import Callback, Run, StepResult, build_student, checkpoint_config, train
from megapd.training.telemetry import PEAK_TFLOPS
from megapd.trajectory.writer import write_checkpoint

BLOCKS = 512


class Sizes(NamedTuple):
    layers: int
    hidden: int
    heads: int

    def setting(self, kind: str, compiled: bool) -> str:
        shape = f"layers: {self.layers}, hidden: {self.hidden}, heads: {self.heads}"
        return f"--model={{kind: {kind}, {shape}, compile: {str(compiled).lower()}}}"


class Case(NamedTuple):
    name: str
    style: str  # gpt or bert
    student: Sizes
    teacher: Sizes | None
    vocabulary: int
    length: int
    batch: int
    micro_batch: int
    compiled: bool = False
    plain: bool = False


def cases(tiny: bool) -> list[Case]:
    if tiny:
        small, large = Sizes(2, 32, 2), Sizes(2, 64, 2)
        gpt, bert = ("gpt", small, None, 512, 32, 4, 2), ("bert", small, None, 512, 32, 4, 2)
        return [
            Case("gpt", *gpt),
            Case("gpt plain", *gpt, plain=True),
            Case("gpt distilled", "gpt", small, large, 512, 32, 4, 2),
            Case("bert", *bert),
        ]
    small, medium = Sizes(12, 768, 12), Sizes(24, 1024, 16)
    gpt, bert = (small, None, 50304, 1024, 64, 32), (small, None, 30592, 512, 128, 64)
    return [
        Case("gpt2 124M", "gpt", *gpt),
        Case("gpt2 124M compiled", "gpt", *gpt, compiled=True),
        Case("gpt2 124M plain", "gpt", *gpt, plain=True),
        Case("gpt2 124M distilled by 350M", "gpt", small, medium, 50304, 1024, 64, 32),
        Case("gpt2 124M distilled by 350M, compiled", "gpt", small, medium, 50304, 1024, 64, 32, compiled=True),
        Case("bert base", "bert", *bert),
        Case("bert base compiled", "bert", *bert, compiled=True),
        Case("gpt2 350M compiled", "gpt", medium, None, 50304, 1024, 32, 16, compiled=True),
    ]


class Windows(Callback):
    """seconds a step of each window, the device synchronised at its two ends."""

    def __init__(self, warm_up: int, window: int) -> None:
        self._warm_up, self._window = warm_up, window
        self.seconds: list[float] = []
        self._began = 0.0

    def after_step(self, run: Run, result: StepResult) -> None:
        self.tick(result.step)

    def tick(self, step: int) -> None:
        past = step - self._warm_up
        if past < 0 or past % self._window:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if past:
            self.seconds.append((now - self._began) / self._window)
        self._began = now


def configuration(case: Case, folder: Path, name: str, model: str, steps: int, *, taught: bool) -> Config:
    given = [
        f"--name={name}",
        f"--runs_dir={folder}",
        "--task.kind=text",
        f"--task.objective={'clm' if case.style == 'gpt' else 'mlm'}",
        f"--task.corpus={folder / 'corpus'}",
        model,
        f"--training={{steps: {steps}, global_batch: {case.batch}, micro_batch: {case.micro_batch}, zero_stage: 1,"
        " precision: bf16, clip: 1.0}",
        "--telemetry={wandb: disabled, progress: false, every: 1000}",
        "--evaluation.samples=1",
        "--optimizer.lr=1e-5",
    ]
    if taught:
        given += [f"--teacher.trajectory={folder / 'trajectory'}", "--schedule.policy=one_shot"]
    return load(None, given)


def write_teacher(case: Case, folder: Path) -> None:
    """An untrained teacher, as a trajectory of one checkpoint."""
    assert case.teacher is not None
    config = configuration(case, folder, "teacher", case.teacher.setting(case.style, False), 1, taught=False)
    task = build_task(config)
    write_checkpoint(
        folder / "trajectory",
        1,
        build_student(config, task).named_parameters(),
        config=checkpoint_config(config, task),
        vocabulary=task.vocabulary_digest,
        metrics={},
        shard_bytes=256 << 20,
    )


def plain(case: Case, folder: Path, windows: Windows, steps: int) -> None:
    """What a user would write: transformers' GPT-2, autocast, cross entropy over all positions, gradients accumulated."""
    import transformers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = configuration(case, folder, "plain", case.student.setting(case.style, False), steps, taught=False)
    task = build_task(config)
    layers, hidden, heads = case.student
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=case.vocabulary,
            n_positions=case.length,
            n_embd=hidden,
            n_layer=layers,
            n_head=heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="sdpa",
        )
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    for step in range(steps):
        for start in range(0, case.batch, case.micro_batch):
            ids = task.batch(step, range(start, start + case.micro_batch)).to(device).ids
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss * case.micro_batch / case.batch
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        windows.tick(step + 1)


def measure(case: Case, folder: Path, warm_up: int, window: int, count: int) -> dict[str, Any]:
    windows, steps = Windows(warm_up, window), warm_up + window * count
    random_corpus(folder / "corpus", blocks=BLOCKS, length=case.length, vocabulary=case.vocabulary, style=case.style)
    if case.teacher is not None:
        write_teacher(case, folder)
    config = configuration(
        case, folder, "student", case.student.setting(case.style, case.compiled), steps, taught=case.teacher is not None
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if case.plain:
        plain(case, folder, windows, steps)
    else:
        train(config, [windows])
    seconds = statistics.median(windows.seconds)
    tokens = case.batch * case.length / seconds
    found: dict[str, Any] = {"step_seconds": seconds, "windows": windows.seconds, "tokens_per_second": tokens}
    if torch.cuda.is_available():
        task = build_task(config)
        share = task.labelled_per_sample / task.length
        flops = config.model.flops_per_token(classes=task.classes, length=task.length, labelled_share=share)
        peak = next((value for key, value in PEAK_TFLOPS.items() if key in torch.cuda.get_device_name()), None)
        found |= {"mfu": None if peak is None else tokens * flops / (peak * 1e12)}
        found |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    return found


def attempt(case: Case, *sizes: int) -> dict[str, Any]:
    try:
        with tempfile.TemporaryDirectory() as temporary:
            return measure(case, Path(temporary), *sizes)
    except Exception as error:  # on record, and the other cases go on
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("warm-up", 6), ("window", 4), ("windows", 4), ("limit", 400)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/train_gpu.json"))
    arguments = parser.parse_args()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    for case in cases(arguments.tiny):
        if time.perf_counter() - started > arguments.limit:
            found[case.name] = {"error": f"not begun: past --limit {arguments.limit} s"}
            continue
        row = attempt(case, arguments.warm_up, arguments.window, arguments.windows)
        gc.collect()
        if gpu is not None:
            torch.cuda.empty_cache()
        found[case.name] = {**case._asdict(), **row}
        print(case.name, {key: value for key, value in row.items() if key != "windows"}, flush=True)
        question = "seconds a step, tokens a second and MFU of training on one GPU, on random ids"
        packages = ("torch", "triton", "deepspeed", "transformers") if gpu else ("torch", "deepspeed", "transformers")
        write_result(arguments.output, question, arguments, packages, gpu=gpu, cases=found)
    return int(any("error" in row for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
