"""Small teachers' trajectories that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

from megapd.config import Config, load
from megapd.tasks import build_task
from megapd.training import build_student, checkpoint_config
from megapd.trajectory import Trajectory
from megapd.trajectory.writer import write_checkpoint

STEPS = (10, 20, 30)
TASK = [
    "--task.kind=hierarchical_parity",
    "--task.dimension=21",
    "--task.degree=3",
    "--task.labels=8",
    "--training.global_batch=6",
]
SIZES = ["--model.layers=2", "--model.hidden=16", "--model.heads=2", "--model.tied=false"]
MODELS = {
    "gpt": ["--model.kind=gpt", *SIZES],
    "bert": ["--model.kind=bert", *SIZES],
    "mlp": ["--model.kind=mlp", "--model.width=12"],
}


def configuration(model: str, *overrides: str) -> Config:
    return load(None, [*TASK, *MODELS[model], *overrides])


def write_trajectory(folder: Path, model: str = "gpt", *overrides: str, steps: tuple[int, ...] = STEPS) -> Trajectory:
    """Checkpoints of untrained models, the seed of each its step."""
    config = configuration(model, *overrides)
    task = build_task(config)
    for step in steps:
        write_checkpoint(
            folder,
            step,
            build_student(configuration(model, *overrides, f"--seed={step}"), task).named_parameters(),
            config=checkpoint_config(config, task),
            vocabulary=task.vocabulary_digest,
            metrics={},
            shard_bytes=1 << 12,
        )
    return Trajectory(folder)


def write_text_trajectory(folder: Path, corpus: Path, style: str, steps: tuple[int, ...] = STEPS) -> Trajectory:
    """Checkpoints of a GPT or BERT over a prepared corpus, with weights large enough that they disagree."""
    objective = "mlm" if style == "bert" else "clm"
    arguments = ["--task.kind=text", f"--task.objective={objective}", f"--task.corpus={corpus}"]
    arguments.append(f"--model={{kind: {style}, layers: 2, hidden: 24, heads: 2}}")
    task = build_task(load(None, arguments))
    for step in steps:
        config = load(None, [*arguments, f"--seed={step}"])
        model = build_student(config, task)
        write_checkpoint(
            folder,
            step,
            ((name, tensor.detach() * (8.0 if tensor.ndim > 1 else 1.0)) for name, tensor in model.named_parameters()),
            config=checkpoint_config(config, task),
            vocabulary=task.vocabulary_digest,
            metrics={},
            shard_bytes=1 << 14,
        )
    return Trajectory(folder)
