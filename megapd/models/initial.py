"""A student that begins with trained weights instead of random ones: `model.initial`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megapd.config import ModelConfig
from megapd.errors import UserError
from megapd.models.build import Learner
from megapd.models.from_checkpoint import HUGGING_FACE
from megapd.models.hub import load_hugging_face
from megapd.models.weights import copy_weights
from megapd.trajectory import Checkpoint, Checkpoints, Trajectory
from megapd.trajectory.hugging_face import HuggingFaceTrajectory, is_hugging_face
from megapd.trajectory.reader import parse_step

_BLOCK = re.compile(r"(?<=\.blocks\.)[0-9]+(?=\.)")


def start_from(learner: Learner, section: ModelConfig, vocabulary: str) -> str:
    """Copy the weights that section.initial names over the learner's; their digest, for the run's record.

    A source with k times as many blocks gives every k-th, the first of each k (as Sanh et al. 2019, section 3); all else must
    agree in name and shape. vocabulary: digest of the task's, which the source's must be. Raises UserError otherwise, with
    nothing copied.
    """
    assert section.initial is not None
    checkpoints, step = _opened(section.initial)
    checkpoint = checkpoints.checkpoint(step)
    if not checkpoint.speaks(vocabulary):
        theirs = checkpoint.vocabulary[:12] or "one that nothing beside it tells"
        what = f"{checkpoint.path} was trained on vocabulary {theirs}, the task has {vocabulary[:12]}"
        raise UserError(f"model.initial: {what}; prepare the corpus with its tokenizer (`megapd prepare CONFIG --like`)")
    kind, weights = _weights(checkpoints, checkpoint)
    if kind != section.kind:
        raise UserError(f"model.initial: {checkpoint.path} is a {kind}, but model.kind is {section.kind}; set that")
    names = [name for name, _ in learner.named_parameters()]
    every = _every(names, weights, checkpoint.path)
    chosen = {name: _BLOCK.sub(lambda match: str(int(match[0]) * every), name) for name in names}
    missing = sorted(set(chosen.values()) - weights.keys())
    if missing:
        raise UserError(
            f"model.initial: {checkpoint.path} has no {missing[0]}; is model.tied, or another model setting, its own?"
        )
    try:
        copy_weights(learner, {name: weights[source] for name, source in chosen.items()}, checkpoint.path)
    except UserError as error:
        fix = "set the model's sizes (hidden, ffn, max_length, the corpus' vocab_size) as its are"
        raise UserError(f"model.initial: {error}; {fix}") from error
    return checkpoint.digest


def _opened(source: str) -> tuple[Checkpoints, int]:
    """The trajectory that holds the weights, and their step: the newest of a run or trajectory, or a published model's."""
    folder = Path(source)
    if (folder / "trajectory").is_dir():
        folder = folder / "trajectory"
    elif (folder / "run.json").exists():
        raise UserError(f"model.initial: {source} wrote no trajectory; `megapd export` it, and name the export")
    elif is_hugging_face(source):
        published = HuggingFaceTrajectory(source)
        if len(published.steps) > 1:
            raise UserError(f"model.initial: {source} stands for {len(published.steps)} checkpoints; name one of them")
        return published, published.steps[0]
    step = parse_step(folder.name)
    trajectory = Trajectory(folder if step is None else folder.parent)
    if not trajectory.steps:
        raise UserError(f"model.initial: {source} holds no checkpoint; name a run, a checkpoint's folder, or hf:REPO[@REVISION]")
    return trajectory, trajectory.steps[-1] if step is None else step


def _weights(checkpoints: Checkpoints, checkpoint: Checkpoint) -> tuple[str, Mapping[str, Tensor]]:
    """(kind, tensors by megapd's names)."""
    if HUGGING_FACE in checkpoint.config:
        config, learner = load_hugging_face(checkpoint.path)
        return config.kind, dict(learner.named_parameters())
    assert isinstance(checkpoints, Trajectory)
    return str(checkpoint.config["model"]["kind"]), checkpoints.load(checkpoint.step)


def _every(names: list[str], weights: Mapping[str, Tensor], where: Path) -> int:
    """How many blocks of the source there are for each of the learner's."""
    own, theirs = (1 + max((int(m[0]) for n in group if (m := _BLOCK.search(n))), default=0) for group in (names, weights))
    if theirs % own:
        fix = f"set model.layers to a divisor of {theirs}"
        raise UserError(f"model.initial: {where} has {theirs} blocks, of which {own} are no even share; {fix}")
    return theirs // own
