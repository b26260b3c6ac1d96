"""A run's weights as a folder that transformers reads: model, tokenizer, generation settings and a card that says what it is."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megapd import __version__
from megapd.config import Config, TextConfig
from megapd.errors import UserError
from megapd.models import build_model, copy_weights, parameter_count, save_hugging_face
from megapd.signals import DTYPES
from megapd.tasks import Task, build_task, tokens_per_sample
from megapd.tasks.blocks import Split, read_meta
from megapd.tasks.tokenizer import corpus_vocabulary
from megapd.tokenization import Tokenizer
from megapd.tokenization.export import same_ids, special_ids, transformers_files
from megapd.training.folder import METRICS, RunRecord, check_weights, numbers, recorded
from megapd.training.state import StateReader, holds_state
from megapd.trajectory import Trajectory
from megapd_kernels import LossOptions

CHECKED_BLOCKS = 64  # held-out blocks whose text the exported tokenizer has to encode as the corpus' own does

log = logging.getLogger(__name__)


class Exported(NamedTuple):
    """What was exported: the step, from which folder, and the folder it is in."""

    step: int
    source: Path
    folder: Path


def export(
    config: Config, output: Path, *, step: int | None = None, dtype: str | None = None, shard_bytes: int = 5 << 30
) -> Exported:
    """Write the weights of a run's step to the new folder `output`.

    step: with a checkpoint of the trajectory, or a resumable one, whatever ranks wrote it; None: the newest of both. dtype: fp32,
    bf16 or fp16; None: that of the weights. Raises UserError where there is no such step, the corpus is not here or another one
    now, or the model has no layout in transformers.
    """
    record = check_weights(config.folder)
    task = build_task(config)
    if record is not None and record.digests.get("vocabulary", task.vocabulary_digest) != task.vocabulary_digest:
        raise UserError(f"task.corpus: {config.folder} learnt another vocabulary than the corpus has now; restore the corpus")
    found, source, weights = _weights(config.folder, step)
    sizes = {"vocab_size": task.vocab_size, "classes": task.classes, "length": task.length}
    learner = build_model(config.model, **sizes, options=LossOptions(), seed=0)
    copy_weights(learner, weights, source)
    learner.to(DTYPES[dtype] if dtype is not None else next(iter(weights.values())).dtype)
    card = _card(config, task, record, found, parameter_count(learner)[0])
    beside: dict[str, bytes] = {"README.md": card.encode()}
    ids: dict[str, int] = {}
    if isinstance(config.task, TextConfig):
        folder, tokenizer, roles, style = corpus_vocabulary(config, "task.corpus")
        files = transformers_files(tokenizer, roles, style, task.length)
        _check_ids(files, tokenizer, folder)
        ids = special_ids(tokenizer, roles, style)
        beside |= files
        if style == "gpt":
            beside["generation_config.json"] = (json.dumps({**ids, "max_length": task.length}, indent=1) + "\n").encode()
    save_hugging_face(learner, config.model, output, shard_bytes=shard_bytes, special_tokens=ids, beside=beside)
    return Exported(found, source, output)


def _weights(folder: Path, step: int | None) -> tuple[int, Path, Mapping[str, Tensor]]:
    """(step, where they are, the weights) of the step that is asked for."""
    trajectory = Trajectory(folder / "trajectory", must_exist=False)
    states = {int(p.name.removeprefix("step_")): p for p in (folder / "checkpoints").glob("step_*") if holds_state(p)}
    steps = sorted({*trajectory.steps, *states})
    if not steps:
        raise UserError(f"{folder} has neither a trajectory nor a checkpoint to export")
    wanted = steps[-1] if step is None else step
    if wanted in trajectory.steps:
        checkpoint = trajectory.checkpoint(wanted)
        return wanted, checkpoint.path, trajectory.load(wanted)
    if wanted not in states:
        raise UserError(f"--step: {folder} has no checkpoint of step {wanted}; there are {', '.join(map(str, steps))}")
    with StateReader(states[wanted]) as state:
        return wanted, states[wanted], dict(state.weights())


def _check_ids(files: Mapping[str, bytes], tokenizer: Tokenizer, folder: Path) -> None:
    held = Split(folder, read_meta(folder), "heldout")
    ids = held.ids(np.arange(min(CHECKED_BLOCKS, len(held))))
    texts = [tokenizer.decode(row) for row in ids]
    if differ := same_ids(files, tokenizer, texts):
        what = f"of {len(texts)} texts and a hard sample, {differ} are cut at another place by the exported tokenizer.json"
        log.warning("%s; tokenizer.model beside it is exact", what)


def _card(config: Config, task: Task, record: RunRecord | None, step: int, parameters: int) -> str:
    """README.md in the form of the hub's model cards."""
    causal = config.model.causal
    lines = ["---", "library_name: transformers", f"pipeline_tag: {'text-generation' if causal else 'fill-mask'}"]
    lines += ["tags: [megapd, progressive-distillation]", "---", "", f"# {config.name}", ""]
    tokens = round(step * config.training.global_batch * tokens_per_sample(task))
    facts = {
        "model": f"{config.model.kind}, {parameters:,} parameters, {task.vocab_size:,} tokens, {task.length} positions",
        "run": "" if record is None else f"{record.id}, numerics {record.numerics}",
        "step": f"{step:,} of {config.training.steps:,}, {tokens:,} tokens",
        "seed": str(config.seed),
        "data digest": task.data_digest,
        "tokenizer digest": task.vocabulary_digest,
        "sources": ", ".join(source.path or str(source.hub) for source in config.corpus.sources),
        "teacher": "none: labels alone" if config.teacher is None else str(config.teacher.trajectory or "served"),
        "loss": f"{config.loss.divergence}, alpha {config.loss.alpha:g}" if config.teacher is not None else "cross entropy",
        "made with": f"megapd {__version__}, torch {torch.__version__}",
    }
    lines += [f"- {name}: {value}" for name, value in facts.items() if value]
    told = recorded(config.folder / METRICS, step)
    if rotations := [line for line in told if line["kind"] == "rotation"]:
        lines += ["", "## Teachers", "", "| from student step | checkpoint | digest |", "|---|---|---|"]
        lines += [f"| {line['step']:,} | {line['teacher_step']:,} | {line['teacher'][:12]} |" for line in rotations]
    if evaluations := [line for line in told if line["kind"] == "eval"]:
        last = evaluations[-1]
        lines += ["", "## Results", "", f"On held-out text, after step {last['step']:,}.", "", "| measure | value |", "|---|---|"]
        measures = numbers("heldout", {key: value for key, value in last.items() if key not in ("step", "samples")})
        lines += [f"| {name} | {value:.6g} |" for name, value in measures.items()]
    return "\n".join(lines) + "\n"
