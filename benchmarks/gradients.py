"""How far a gradient in bf16 lies from that in fp32, by where it is summed: over tokens, over micro-batches, over ranks.

    python benchmarks/gradients.py [--ranks 2 4] [--output benchmarks/results/gradients.json]

One global batch of Zipf-distributed tokens through a small BERT; errors are relative to the gradient that one fp32 pass over the
whole batch gives. `tokens`: one micro-batch, by parameter, as the models are and with torch's own layers. `micro_batches`: 512 on
one rank, at each ZeRO stage, as megapd configures DeepSpeed and with DeepSpeed's own default. `ranks`: one micro-batch a rank
over gloo, as configured and with a reduction in bf16. `ring`: what the reduction alone adds on more ranks than a machine has, the
hops of a ring all-reduce played in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed
import deepspeed.utils
import torch
from common import write_result
from torch import Tensor, nn

from megapd.batch import Batch
from megapd.config import Config, load
from megapd.models import Learner, build_model
from megapd.models.layers import Embedding, LayerNorm
from megapd.training import start_world, student_engine
from megapd.world import World
from megapd_kernels import LossOptions

VOCABULARY, LENGTH, SAMPLES, LABELLED = 600, 64, 1024, 19  # 19 of 64: the mask rate of 0.3
RING = (2, 4, 8, 16, 64, 256)
SHOWN = ("body.tokens.weight", "body.norm.weight", "body.norm.bias", "transform.norm.weight", "body.blocks.0.up.weight")


def student(config: Config) -> Learner:
    sizes = {"vocab_size": VOCABULARY, "classes": VOCABULARY, "length": LENGTH}
    return build_model(config.model, **sizes, options=LossOptions(), seed=0)


def batch(rows: range) -> Batch:
    """Rows of the global batch, which is the same whatever is asked for."""
    generator = torch.Generator().manual_seed(1)
    zipf = 1.0 / torch.arange(1, VOCABULARY + 1)
    ids = torch.multinomial(zipf, SAMPLES * LENGTH, replacement=True, generator=generator).view(SAMPLES, LENGTH)
    chosen = torch.rand(SAMPLES, LENGTH, generator=generator).argsort(1)[:, :LABELLED].sort(1).values
    masked = ids.scatter(1, chosen, 0)[rows.start : rows.stop]
    labels = ids.gather(1, chosen)[rows.start : rows.stop].flatten()
    positions = (chosen[rows.start : rows.stop] + torch.arange(len(rows))[:, None] * LENGTH).flatten()
    return Batch(masked.contiguous(), None, positions, labels, torch.arange(rows.start, rows.stop))


def configuration(stage: int, micro_batch: int, *settings: str) -> Config:
    model = ["--model={kind: bert, layers: 1, heads: 2, hidden: 32}", f"--task={{kind: parity, dimension: {LENGTH}}}"]
    size = [f"--training.global_batch={SAMPLES}", f"--training.micro_batch={micro_batch}", f"--training.zero_stage={stage}"]
    return load(None, [*model, *size, *settings])


def of_learner(learner: Learner, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradients of one pass over the whole batch."""
    learner = learner.to(dtype)
    learner(batch(range(SAMPLES)), None, SAMPLES * LABELLED)[0].backward()
    return {name: parameter.grad.double() for name, parameter in learner.named_parameters() if parameter.grad is not None}


def of_engine(config: Config, world: World) -> dict[str, Tensor]:
    engine = student_engine(config, student(config), world)
    for rows in engine.tiling.rows(world.rank):
        engine.accumulate(batch(rows), None, SAMPLES * LABELLED)
    named = engine.learner.named_parameters()
    found = {name: deepspeed.utils.safe_get_full_grad(parameter).double() for name, parameter in named}
    engine.destroy()
    return found


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of all parameters together, relative."""
    square = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
    return round((square / sum(float(tensor.square().sum()) for tensor in exact.values())) ** 0.5, 5)


def deepspeed_default(folder: Path, stage: int) -> str:
    """--training.deepspeed of a copy of the stage's JSON that leaves sums in the model's type."""
    settings = json.loads((resources.files("megapd.configs") / "deepspeed" / f"zero{stage}.json").read_text())
    settings |= {"communication_data_type": "bf16"} | ({"data_types": {"grad_accum_dtype": "bf16"}} if stage else {})
    (folder / f"zero{stage}.json").write_text(json.dumps(settings))
    return f"--training.deepspeed={folder / f'zero{stage}.json'}"


def with_layers_of_torch(learner: Learner) -> Learner:
    for module in learner.modules():
        for ours, plain in ((LayerNorm, nn.LayerNorm), (Embedding, nn.Embedding)):
            if type(module) is ours:
                module.__class__ = plain
    return learner


def over_tokens(exact: dict[str, Tensor]) -> dict[str, Any]:
    config, found = configuration(0, SAMPLES), {}
    for name, learner in (("megapd", student(config)), ("torch", with_layers_of_torch(student(config)))):
        half = of_learner(learner, torch.bfloat16)
        shown = {key: error({key: half[key]}, {key: exact[key]}) for key in SHOWN}
        norm = round(float(torch.cat([tensor.flatten() for tensor in half.values()]).norm()), 5)
        found[name] = {"error": error(half, exact), "norm": norm, "by_parameter": shown}
    norm = round(float(torch.cat([tensor.flatten() for tensor in exact.values()]).norm()), 5)
    return {"norm_fp32": norm, **found}


def over_ring(parts: list[dict[str, Tensor]], exact: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """parts: gradients of the sixteenths of the batch; of more than 16 ranks, several hold the same one."""
    found = {}
    for ranks in RING:
        given = [parts[rank % len(parts)] for rank in range(ranks)]
        sums: dict[str, dict[str, Tensor]] = {"bf16": {}, "fp32": {}}
        for name in exact:
            ring = given[0][name].bfloat16()
            for part in given[1:]:
                ring = ring + part[name].bfloat16()
            sums["bf16"][name] = ring.double() / ranks
            sums["fp32"][name] = sum(part[name].bfloat16().float() for part in given).double() / ranks
        mean = {name: sum(part[name] for part in given) / ranks for name in exact}
        found[str(ranks)] = {key: error(value, mean) for key, value in sums.items()}
    return found


def worker(output: Path) -> None:
    """On each of several ranks."""
    world = start_world()
    exact = of_learner(student(configuration(0, SAMPLES)), torch.float32)
    found: dict[str, dict[str, float]] = {}
    for stage in range(4):
        half = ["--training.precision=bf16"]
        size = SAMPLES // world.size
        ours = error(of_engine(configuration(stage, size, *half), world), exact)
        if world.rank == 0:
            deepspeed_default(output.parent, stage)
        world.barrier()
        theirs = f"--training.deepspeed={output.parent / f'zero{stage}.json'}"
        found[f"stage {stage}"] = {
            "fp32": ours,
            "bf16": error(of_engine(configuration(stage, size, *half, theirs), world), exact),
        }
    if world.rank == 0:
        output.write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gradients.json"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(arguments.worker)
        return
    exact = of_learner(student(configuration(0, SAMPLES)), torch.float32)
    tokens = over_tokens(exact)
    print(json.dumps(tokens, indent=1), flush=True)
    micro_batches, ranks = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, world = Path(temporary), start_world()
        for stage in range(4):
            config = configuration(stage, 2, "--training.precision=bf16")
            found = {"megapd": error(of_engine(config, world), exact)}
            if stage:  # at stage 0 DeepSpeed has no setting for it, see Engine
                default = configuration(stage, 2, "--training.precision=bf16", deepspeed_default(folder, stage))
                found["deepspeed"] = error(of_engine(default, world), exact)
            micro_batches[f"stage {stage}"] = found
            print(f"stage {stage}", found, flush=True)
        for number in arguments.ranks:
            launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={number}", __file__]
            output = folder / f"{number}.json"
            subprocess.run([*launcher, f"--worker={output}"], check=True, capture_output=True)
            ranks[str(number)] = json.loads(output.read_text())
            print(f"{number} ranks", ranks[str(number)], flush=True)
    parts = []
    for start in range(0, SAMPLES, SAMPLES // 16):
        learner = student(configuration(0, SAMPLES))
        learner(batch(range(start, start + SAMPLES // 16)), None, SAMPLES * LABELLED)[0].backward()
        parts.append({name: p.grad.double() for name, p in learner.named_parameters() if p.grad is not None})
    ring = over_ring(parts, exact)
    print("ring", ring, flush=True)
    del arguments.worker
    question = "relative error of a gradient in bf16, by where it is summed"
    results = {"tokens": tokens, "micro_batches": micro_batches, "ranks": ranks, "ring": ring}
    write_result(arguments.output, question, arguments, ("torch", "deepspeed"), **results)


if __name__ == "__main__":
    main()
