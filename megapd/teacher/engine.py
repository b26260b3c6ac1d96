"""The teacher: one checkpoint of a trajectory held in memory, swapped in place at a rotation.

This engine holds the whole model on every rank. Its weights are never trained: no gradient, no optimizer.
"""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from megapd.batch import Batch
from megapd.config import Model
from megapd.errors import UserError
from megapd.kernels import LossOptions, default_chunk_bytes
from megapd.models import Learner, build_model
from megapd.models.weights import copy_weights
from megapd.signal import Head, Kind, Signal
from megapd.tasks import Task
from megapd.trajectory import Checkpoint, Trajectory

POLL_SECONDS = 0.2


class Teacher:
    """Answers batches with signals of the checkpoint it holds.

    `prepare` reads and verifies a checkpoint on a thread, `rotate` copies it over the one in place: the step that
    rotates waits for the copy alone if the checkpoint was prepared early enough.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        task: Task,
        device: torch.device,
        dtype: torch.dtype,
        chunk_bytes: int | None,
        wait_seconds: float | None = None,
    ) -> None:
        """chunk_bytes: most bytes of logits alive at once in `signal`; None: the kernels' default. wait_seconds: how long
        `rotate` waits for a checkpoint that a teacher, training meanwhile, is still to write; None: it must be there."""
        self.trajectory = trajectory
        self._wait_seconds = wait_seconds
        self._closed = threading.Event()
        self.device, self.dtype, self.chunk_bytes = device, dtype, chunk_bytes
        self.held: Checkpoint | None = None
        self._task = task
        self._model: Learner | None = None
        self._head: Head | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="teacher-reader")
        self._ahead: dict[int, Future[tuple[Checkpoint, dict[str, Tensor]]]] = {}

    def prepare(self, step: int) -> None:
        """Start reading the checkpoint of teacher step `step`, as soon as it is written."""
        if step not in self._ahead and (self.held is None or self.held.step != step):
            self._ahead[step] = self._reader.submit(self._read, step)

    def ready(self, step: int) -> bool:
        """Whether `rotate(step)` would not wait; begins to prepare it if nothing has."""
        if self.held is not None and self.held.step == step:
            return True
        self.prepare(step)
        return self._ahead[step].done()

    def rotate(self, step: int) -> Checkpoint:
        """Hold the checkpoint of teacher step `step` from now on.

        Raises UserError if it is missing, damaged, or of another vocabulary or architecture; CheckpointTimeout if it was not
        written within wait_seconds from now, however long ago it was prepared.
        """
        if self.held is not None and self.held.step == step:
            return self.held
        self.prepare(step)
        if self._wait_seconds is not None:
            self.trajectory.wait_for(step, self._wait_seconds)
        checkpoint, tensors = self._ahead.pop(step).result()
        if self._model is None:
            self._model = self._build(checkpoint)
        copy_weights(self._model, tensors, checkpoint.path)
        head = self._model.head
        self._head = Head(head.weight.detach(), None if head.bias is None else head.bias.detach())
        self.held = checkpoint
        return checkpoint

    @torch.no_grad()
    def signal(self, batch: Batch, kind: Kind) -> Signal:
        """The signal for the labelled positions of `batch`: values [N, V], [N, D] or [N] int64 as the kind says."""
        assert self.held is not None, "rotate() comes before signal()"
        assert self._model is not None
        if kind == "dense":
            values, head = self._model(batch, mode="logits"), None
        else:
            values, head = self._model(batch, mode="hidden"), self._head
            if kind == "argmax":
                values, head = self._argmax(values), None
        return Signal(kind=kind, teacher=self.held.digest, samples=batch.digest, values=values, head=head)

    def close(self) -> None:
        self._closed.set()
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _read(self, step: int) -> tuple[Checkpoint, dict[str, Tensor]]:
        while self._wait_seconds is not None and not self.trajectory.written(step):
            # No deadline here: a refresh may take hours, and `rotate` counts its own wait. The event lets the process end.
            if self._closed.wait(POLL_SECONDS):
                raise CancelledError
        checkpoint = self.trajectory.checkpoint(step)
        if checkpoint.vocabulary != self._task.vocabulary_digest:
            raise UserError(
                f"teacher.trajectory: {checkpoint.path} has vocabulary {checkpoint.vocabulary[:12]}, but the student's "
                f"task has {self._task.vocabulary_digest[:12]}; teacher and student need the same tokenizer or task parameters"
            )
        tensors = self.trajectory.load(step)
        if self.device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return checkpoint, tensors

    def _build(self, checkpoint: Checkpoint) -> Learner:
        try:
            model_config = TypeAdapter[Model](Model).validate_python(checkpoint.config["model"])
            shapes = checkpoint.config["shapes"]
        except (KeyError, ValidationError) as error:
            what = " ".join(str(error).split())
            raise UserError(f"{checkpoint.path / 'meta.json'}: no usable model configuration: {what}") from error
        if shapes["length"] < self._task.length:
            raise UserError(
                f"teacher.trajectory: the teacher was trained on {shapes['length']} tokens a sample, "
                f"the student's task has {self._task.length}; shorten corpus.block_length, or choose another teacher"
            )
        options = LossOptions(chunk_bytes=self.chunk_bytes)
        model = build_model(
            model_config,
            vocab_size=shapes["vocab_size"],
            classes=shapes["classes"],
            length=shapes["length"],
            options=options,
            seed=0,
        )
        return model.to(self.device, self.dtype).requires_grad_(False).eval()

    def _argmax(self, hidden: Tensor) -> Tensor:
        """Class ids [N] int64; logits of at most chunk_bytes exist at once."""
        assert self._head is not None
        weight, bias = self._head.weight, self._head.bias
        rows = max(1, (self.chunk_bytes or default_chunk_bytes(hidden.device)) // (4 * weight.shape[0]))
        ids = [torch.nn.functional.linear(part, weight, bias).argmax(-1) for part in hidden.split(rows)]
        return torch.cat(ids)
