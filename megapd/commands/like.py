"""`megapd prepare CONFIG --like TEACHER`: a corpus that a teacher can teach on."""

from __future__ import annotations

from pathlib import Path

from megapd.config import Config, TextConfig, TokenizerConfig
from megapd.errors import UserError
from megapd.models.from_checkpoint import checkpoint_shape
from megapd.tasks.blocks import META, read_meta
from megapd.trajectory import Trajectory
from megapd.trajectory.hugging_face import HuggingFaceTrajectory, is_hugging_face


def with_tokenizer_of(config: Config, like: str) -> Config:
    """The configuration with corpus.tokenizer as a teacher's: its tokenizer, its number of ids, and the objective's style.

    Raises UserError where the teacher cannot be found or described, has no tokenizer, or the configuration names another one.
    """
    teacher = like or (config.teacher.trajectory if config.teacher is not None else None)
    if not teacher:
        raise UserError("--like: name a teacher, or set teacher.trajectory")
    steps = config.teacher.steps if config.teacher is not None else ()
    if is_hugging_face(teacher):
        published = HuggingFaceTrajectory(teacher, steps)
        first = published.steps[0]
        model, size = published.located(first), checkpoint_shape(published.describe(first)).vocab_size
    else:
        model, size = _corpus_of(Path(teacher))
    asked = config.corpus.tokenizer
    if asked.model not in (None, model):
        raise UserError(f"corpus.tokenizer.model: {asked.model}, but --like would take {model}; leave one of them out")
    style = asked.style
    if "style" not in asked.model_fields_set and isinstance(config.task, TextConfig):
        style = "bert" if config.task.objective == "mlm" else "gpt"
    size = size if asked.vocab_size is None else asked.vocab_size
    section = TokenizerConfig(**{**asked.model_dump(), "model": model, "vocab_size": size, "style": style})
    return config.model_copy(update={"corpus": config.corpus.model_copy(update={"tokenizer": section})})


def _corpus_of(folder: Path) -> tuple[str, int]:
    """The corpus that one of megapd's own runs learnt from, and its number of ids."""
    trajectory = Trajectory(folder)
    tree = trajectory.checkpoint(trajectory.steps[0]).config
    corpus = (tree.get("task") or {}).get("corpus") or (tree.get("corpus") or {}).get("output")
    if not corpus or not (Path(corpus) / META).is_file():
        raise UserError(
            f"--like: {folder} was trained on a corpus at {corpus}, which is not here; name it in task.corpus instead"
        )
    return str(corpus), int(read_meta(Path(corpus))["tokenizer"]["vocab_size"])
