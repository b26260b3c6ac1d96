"""`megapd distil TEACHER`: from a published teacher and some text to an exported student, in one command."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from megapd.analysis.suggest import open_source
from megapd.analysis.timeline import describe_plan
from megapd.commands.like import with_tokenizer_of
from megapd.commands.prepare import prepare_corpus
from megapd.commands.train import train_command
from megapd.config import Config, ModelConfig, flatten, load, parse_overrides
from megapd.errors import UserError
from megapd.files import write_atomic
from megapd.models import HUGGING_FACE, checkpoint_shape, model_section
from megapd.schedule.resolve import resolve_plan
from megapd.tasks import Task, build_task
from megapd.teacher.locate import open_trajectory
from megapd.teacher.setup import describe_signal, signal_spec
from megapd.training.export import export
from megapd.trajectory import Checkpoint, Trajectory

SIZES = {"tiny": (4, 4, 128), "mini": (4, 8, 256), "small": (6, 8, 512), "base": (12, 12, 768)}  # layers, heads, hidden
TEACHERS = 6  # checkpoints, where nobody says which: as many as the paper's text runs have
BLOCK_LENGTH, STEPS = 512, 10_000
YAML, VERIFIED = "distil.yaml", "verified.json"


def distil(overrides: list[str], teacher: str, *, steps: tuple[int, ...], student: str, data: Sequence[str], output: Path) -> int:
    """`megapd distil TEACHER [--steps S,S] --student SIZE --data SOURCE [SOURCE] --output OUT [settings]`.

    Verifies the teacher's checkpoints, prepares the corpus with its tokenizer, shows the schedule and what the signals cost,
    trains and exports. Each stage is kept in OUT, and not done again by the same command. The configuration is
    OUT/distil.yaml, with which every stage can be run by its own verb, on several devices too.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"distil: it is one process; run it, then: deepspeed --module megapd train {output / YAML}")
    trajectory = open_source(teacher, steps)
    named = str(trajectory.folder) if isinstance(trajectory, Trajectory) else teacher
    first = trajectory.describe(trajectory.steps[0])
    chosen = _chosen(trajectory.steps)
    tree = _tree(overrides, named, steps, chosen, first, student, data, output)
    config = _kept(tree, output)
    print((output / YAML).read_text(), flush=True)
    _verify(trajectory, chosen, output)
    prepare_corpus(with_tokenizer_of(config, ""))
    task = build_task(config)
    held = task.heldout_samples
    if "samples" not in config.evaluation.model_fields_set and held < config.evaluation.samples:
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"samples": held})})
    _show(config, task)
    train_command(config, allow_change=[], take_over=False)
    model = output / "model"
    if model.exists():
        print(f"{model}: exported already")
    else:
        export(config, model)
        print(f"{model}: the student as transformers reads it")
    return 0


def _chosen(steps: Sequence[int]) -> tuple[int, ...]:
    """Of many checkpoints TEACHERS, evenly spaced in the logarithm of the step, with the last: a teacher learns most early."""
    trained = [step for step in steps if step > 0] or list(steps)
    if len(trained) <= TEACHERS:
        return tuple(trained)
    ratio = trained[-1] / trained[0]
    wanted = [trained[0] * ratio ** (number / (TEACHERS - 1)) for number in range(TEACHERS)]
    return tuple(sorted({min(trained, key=lambda step: abs(step - target)) for target in wanted}))


def _tree(
    overrides: list[str],
    teacher: str,
    steps: tuple[int, ...],
    chosen: tuple[int, ...],
    first: Checkpoint,
    student: str,
    data: Sequence[str],
    output: Path,
) -> dict[str, Any]:
    """What distil.yaml holds: the settings that this command makes, and over them those that were given."""
    given = parse_overrides(overrides)
    shape = checkpoint_shape(first)
    causal, model = _student(first, student)
    length = min(BLOCK_LENGTH, shape.length or BLOCK_LENGTH)
    total = int(given.get("training", {}).get("steps", STEPS))
    every = max(1, total // len(chosen))
    own: dict[str, Any] = {
        "name": "run",
        "runs_dir": str(output),
        "corpus": {
            "output": str(output / "corpus"),
            "sources": [_source(name) for name in data],
            "block_length": length,
        },
        "task": {"kind": "text", "objective": "clm" if causal else "mlm"},
        "model": model,
        "teacher": {"trajectory": teacher, **({"steps": list(steps)} if steps else {})},
        "schedule": {
            "policy": "explicit",
            "ranges": [{"start": number * every, "checkpoint": step} for number, step in enumerate(chosen)],
        },
        "training": {"steps": total, "global_batch": 64, "precision": "bf16" if torch.cuda.is_available() else "fp32"},
        "optimizer": {"lr": 1e-3},
        "lr": {"kind": "cosine", "warmup": 0.06},
    }
    for name, value in given.items():
        own[name] = {**own.get(name, {}), **value} if isinstance(value, dict) and isinstance(own.get(name), dict) else value
    return own


def _student(first: Checkpoint, size: str) -> tuple[bool, dict[str, Any]]:
    """(whether it is causal, the section `model`): of the teacher's family where megapd has it, of that size."""
    if size in SIZES:
        layers, heads, hidden = SIZES[size]
    elif match := re.fullmatch(r"(\d+)x(\d+)x(\d+)", size):
        layers, heads, hidden = (int(number) for number in match.groups())
    else:
        known = ", ".join(f"{name} ({'x'.join(map(str, sizes))})" for name, sizes in SIZES.items())
        raise UserError(f"--student: {size!r} is no size; choose {known}, or LAYERSxHEADSxHIDDEN")
    sizes = {"layers": layers, "heads": heads, "hidden": hidden}
    section = model_section(first)
    if section is not None:
        return bool(section.causal), {**_architecture(section), **sizes}
    causal = not any("MaskedLM" in str(name) for name in first.config[HUGGING_FACE].get("architectures") or ())
    return causal, {"kind": "llama" if causal else "modernbert", **sizes}


def _architecture(section: ModelConfig) -> dict[str, Any]:
    """The settings that make a family's member what it is, without its sizes, and how the teacher was trained."""
    others = {"layers", "heads", "hidden", "ffn", "kv_heads", "head_size", "max_length"}
    others |= {"initial", "activation_checkpointing", "compile"}
    default = type(section).model_construct(kind=section.kind).model_dump()
    return {k: v for k, v in section.model_dump().items() if k == "kind" or (k not in others and v != default.get(k))}


def _source(name: str) -> dict[str, Any]:
    """A file, folder or glob, or hub:DATA_SET[:CONFIGURATION]."""
    if not name.startswith("hub:"):
        return {"path": name}
    data_set, _, configuration = name.removeprefix("hub:").partition(":")
    return {"hub": data_set, **({"hub_config": configuration} if configuration else {})}


def _kept(tree: dict[str, Any], output: Path) -> Config:
    """The configuration, in OUT/distil.yaml; UserError where that holds another one."""
    path = output / YAML
    if path.exists():
        before, now = flatten(yaml.safe_load(path.read_text())), flatten(tree)
        different = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if different:
            raise UserError(f"--output: {path} was made with another {', '.join(different[:4])}; choose another folder")
        return load(path)
    output.mkdir(parents=True, exist_ok=True)
    content = yaml.safe_dump(tree, sort_keys=False)
    config = _checked(content, output)
    write_atomic(path, content)
    return config


def _checked(content: str, output: Path) -> Config:
    """Loaded before it is kept: what the tree refuses leaves no file that would have to be removed."""
    trial = output / f"{YAML}.trial"
    trial.write_text(content)
    try:
        return load(trial)
    finally:
        trial.unlink()


def _verify(trajectory: Any, chosen: Sequence[int], output: Path) -> None:
    """Read every file of the teacher once; the digests that were found good stand in OUT/verified.json."""
    path = output / VERIFIED
    digests = {str(step): trajectory.checkpoint(step).digest for step in chosen}
    if path.exists() and json.loads(path.read_text()) == digests:
        print(f"{len(digests)} checkpoints verified already")
        return
    if problems := trajectory.verify():
        raise UserError(f"teacher.trajectory: {problems[0]} ({len(problems)} problems); leave those steps out with --steps")
    write_atomic(path, json.dumps(digests, indent=1))
    print(f"{len(digests)} checkpoints verified")


def _show(config: Config, task: Task) -> None:
    """The schedule, and what the signals cost by kind."""
    trajectory = open_trajectory(config)
    plan = resolve_plan(config, trajectory)
    checkpoint = trajectory.checkpoint(plan.checkpoint_at(0))
    spec = signal_spec(config, task, plan, checkpoint)
    print(describe_plan(plan))
    print(describe_signal(task, spec, checkpoint_shape(checkpoint)), flush=True)
