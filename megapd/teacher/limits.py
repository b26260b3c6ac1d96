"""What a teacher's model can take and say, held against a student's task: the same for every carrier.

    ids        the largest id that the task can make has a row in the teacher's embedding
    positions  the teacher has a position for each token of a sample
    classes    both heads have as many, or loss.common_vocabulary is set

All are checked by the student before its run begins, from the trajectory's files or from the catalogue that a served teacher
gives; a co-located one again before each checkpoint is taken up. A server holds each request against the first two: an id outside
the embedding is an error of one request on a CPU, but on a GPU it ends the process.
"""

from __future__ import annotations

from dataclasses import dataclass

from megapd.config import Config
from megapd.errors import UserError
from megapd.models import HUGGING_FACE, Shape, checkpoint_shape
from megapd.schedule.plan import Plan
from megapd.tasks import Task
from megapd.trajectory import Checkpoint, Checkpoints


def excess(shape: Shape, largest_id: int, length: int) -> str:
    """What of samples of `length` tokens, ids up to `largest_id`, the teacher cannot take, for a message; "": nothing."""
    if largest_id >= shape.vocab_size:
        return f"id {largest_id} is outside the teacher's vocabulary of {shape.vocab_size}"
    if shape.length is not None and length > shape.length:
        return f"samples have {length} tokens, the teacher has positions for {shape.length}"
    return ""


@dataclass(frozen=True)
class Demands:
    """What the student's task demands of a teacher; None: nothing, where clients check (a server).

    vocabulary         digest that a checkpoint must have
    same_vocabulary    a checkpoint that has none is trusted
    ids                token ids are below it
    length             tokens a sample
    classes            of the student's head
    common_vocabulary  the loss takes the classes that both heads have
    """

    vocabulary: str | None = None
    same_vocabulary: bool = False
    ids: int | None = None
    length: int | None = None
    classes: int | None = None
    common_vocabulary: bool = False

    @staticmethod
    def of(config: Config, task: Task) -> Demands:
        """Those of a run that a teacher teaches."""
        assert config.teacher is not None
        return Demands(
            vocabulary=task.vocabulary_digest,
            same_vocabulary=config.teacher.same_vocabulary,
            ids=task.vocab_size,
            length=task.length,
            classes=task.classes,
            common_vocabulary=config.loss.common_vocabulary,
        )

    def check(self, checkpoint: Checkpoint) -> None:
        """UserError unless the checkpoint can teach the task."""
        where = f"{checkpoint.path} (step {checkpoint.step})"
        if self.vocabulary is not None and not (self.same_vocabulary and not checkpoint.vocabulary):
            if not checkpoint.vocabulary:
                raise UserError(
                    f"teacher.same_vocabulary: {where} does not say which tokenizer it was trained with; "
                    "if its ids mean what the task's do, set this to true"
                )
            if not checkpoint.speaks(self.vocabulary):
                raise UserError(
                    f"teacher.trajectory: {where} has vocabulary {checkpoint.vocabulary[:12]}, but the student's "
                    f"task has {self.vocabulary[:12]}; teacher and student need the same tokenizer or task parameters: "
                    "`megapd prepare CONFIG --like TEACHER` makes a corpus with a published teacher's"
                )
        shape = checkpoint_shape(checkpoint)
        if self.ids is not None and (what := excess(shape, self.ids - 1, 0)):
            fix = "choose a teacher that has them, or prepare the corpus as `megapd prepare CONFIG --like TEACHER` does"
            raise UserError(f"teacher.trajectory: {where}: {what}, and the task has {self.ids} ids; {fix}")
        if self.length is not None and (what := excess(shape, -1, self.length)):
            raise UserError(f"teacher.trajectory: {where}: {what}; shorten corpus.block_length, or choose another teacher")
        if self.classes is not None and shape.classes != self.classes and not self.common_vocabulary:
            what = f"{where} has {shape.classes} classes, the student's task {self.classes}"
            padded = "prepare the corpus with `--like`, which sets corpus.tokenizer.vocab_size to the teacher's, or "
            fix = (
                f"{padded if HUGGING_FACE in checkpoint.config else ''}set this to true to learn over the classes that both have"
            )
            raise UserError(f"loss.common_vocabulary: {what}; {fix}")


def check_teachers(config: Config, task: Task, trajectory: Checkpoints, plan: Plan) -> None:
    """UserError where a checkpoint of the plan cannot teach the task, as far as its description is at hand.

    A JSON file a checkpoint is read and no weights, before a run's folder is made; where that is a call over a network, of the
    first alone.
    """
    demands = Demands.of(config, task)
    steps = [step for step in dict.fromkeys(plan.teachers) if trajectory.written(step)]
    for step in steps[:1] if trajectory.remote else steps:
        demands.check(trajectory.describe(step))
