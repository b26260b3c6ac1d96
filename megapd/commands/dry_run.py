"""The dry run: what a configuration would train, before it does."""

from __future__ import annotations

import os

import torch
from rich.console import Console
from rich.markup import escape

from megapd.analysis.timeline import describe_plan
from megapd.config import Config, dump
from megapd.models import checkpoint_shape, parameter_count
from megapd.schedule.resolve import resolve_plan
from megapd.tasks import Task, build_task, tokens_per_sample
from megapd.teacher.limits import check_teachers
from megapd.teacher.locate import open_trajectory
from megapd.teacher.setup import describe_signal, signal_spec
from megapd.tiling import tile
from megapd.training import build_student
from megapd.training.folder import check_room, room_for
from megapd_kernels import default_chunk_bytes

GIB = 2**30


def show_dry_run(config: Config) -> int:
    Console(soft_wrap=True).print(escape(dry_run(config)), highlight=False)
    return 0


def dry_run(config: Config) -> str:
    """The resolved tree, parameter counts, tokens a step, the schedule and the memory a rank is expected to need."""
    task = build_task(config)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    tiling = tile(config.training, ranks)
    learner = build_student(config, task)
    total, without_embeddings = parameter_count(learner)
    per_sample = tokens_per_sample(task)
    tokens, share = round(config.training.global_batch * per_sample), task.labelled_per_sample / per_sample
    per_token = config.model.flops_per_token(classes=task.classes, length=round(per_sample), labelled_share=share)
    lines = [
        dump(config).rstrip(),
        "",
        f"student        {total:,} parameters, {without_embeddings:,} without embeddings",
        f"ranks          {ranks} x micro-batch {tiling.micro_batch} x accumulation {tiling.accumulation}",
        f"step           {config.training.global_batch:,} samples, {tokens:,} tokens, "
        f"{config.training.global_batch * task.labelled_per_sample:,.0f} labelled, {per_token * tokens / 1e12:.3g} TFLOP",
        f"run            {config.training.steps:,} steps, {config.training.steps * tokens:,} tokens",
    ]
    teacher_bytes = 0
    if config.teacher is not None:
        trajectory = open_trajectory(config)
        plan = resolve_plan(config, trajectory)
        check_teachers(config, task, trajectory, plan)
        source = config.teacher.trajectory or ", ".join(config.teacher.endpoints) or f"leased at {config.scheduler.url}"
        lines.append(f"teacher        {source}, {len(trajectory.steps)} checkpoints, {config.teacher.carrier}")
        if trajectory.steps:
            checkpoint = trajectory.checkpoint(trajectory.steps[-1])
            spec = signal_spec(config, task, plan, checkpoint)
            lines.append(f"               {describe_signal(task, spec, checkpoint_shape(checkpoint))}")
            if config.teacher.carrier == "colocated":
                teacher_bytes = sum(file.stat().st_size for file in checkpoint.path.glob("*.safetensors"))
        elif config.schedule is not None and config.schedule.waits is not None:
            lines.append("               nothing written yet: its memory is not counted")
        if trajectory.incomplete:
            lines.append(f"               incomplete, and not counted: steps {', '.join(map(str, trajectory.incomplete))}")
        lines += ["", describe_plan(plan)]
    free, need = check_room(config, total) / GIB, room_for(config, total) / GIB
    lines += ["", f"disk           {need:.4f} GiB of checkpoints and trajectory, {free:.1f} GiB free in {config.runs_dir}"]
    lines += ["", "expected memory a rank", *memory_lines(config, task, total, tiling.micro_batch, ranks, teacher_bytes)]
    return "\n".join(lines)


def memory_lines(config: Config, task: Task, parameters: int, micro_batch: int, ranks: int, teacher_bytes: int) -> list[str]:
    """Estimated bytes by use.

    States follow the ZeRO paper (arXiv 1910.02054, figure 1): weights and gradients in the run's precision; fp32 copies of the
    weights in mixed precision; two fp32 moments for AdamW, one for SGD with momentum. Stage 1 divides the optimizer's part by
    the ranks, 2 the gradients' too, 3 the weights' too. Gradients of several micro-batches are summed in fp32, at stage 1 beside
    those of the micro-batch itself.
    """
    stage = config.training.zero_stage
    width = 4 if config.training.precision == "fp32" else 2
    several = config.training.global_batch > micro_batch * ranks
    grad_width = 4 + (2 if stage == 1 else 0) if several and width == 2 else width
    moments = 8 if config.optimizer.kind == "adamw" else (4 if config.optimizer.momentum else 0)
    weights = parameters * width / (ranks if stage == 3 else 1)
    gradients = parameters * grad_width / (ranks if stage >= 2 else 1)
    optimizer = parameters * (moments + (0 if width == 4 else 4)) / (ranks if stage >= 1 else 1)
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": float(micro_batch * config.model.activations(task.length) * width),
        "loss": loss_bytes(config, task, micro_batch),
        "teacher": float(teacher_bytes),
    }
    return [f"  {name:<12} {size / GIB:9.4f} GiB" for name, size in {**parts, "total": sum(parts.values())}.items()]


def loss_bytes(config: Config, task: Task, micro_batch: int) -> float:
    """The fused loss: a chunk of logits (12 bytes a class and row: student, teacher, gradient) and the head's gradient.

    The latter is held from forward to backward, or with loss.recompute made in backward; the peak is the same.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logits = 12.0 * task.classes * task.labelled_per_sample * micro_batch
    chunk = min(float(config.loss.chunk_bytes or default_chunk_bytes(device)), logits)
    return chunk + 4.0 * task.classes * config.model.head_width
