"""The first phase of a rotation: a thread reads this rank's parts of a checkpoint to come, verifies and tests them."""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from megapd.errors import UserError
from megapd.models import canary, read_parts
from megapd.teacher.engine.holders import Holder
from megapd.teacher.engine.options import TeacherOptions
from megapd.teacher.limits import Demands
from megapd.trajectory import Checkpoint, Checkpoints, check_files
from megapd.world import World

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
READER_NICENESS = 10  # about a tenth of the share of a thread that computes
STAGED = 4  # checkpoints prepared and not yet used that are kept at most, beside those that fit into holders


class Staged(NamedTuple):
    """A checkpoint whose files were verified, this rank's weights of it, and whether a test batch has passed them."""

    checkpoint: Checkpoint
    tensors: dict[str, Tensor]
    tested: bool


class Staging:
    """Checkpoints that are being read, or were and are yet to be used. `prepare` from any thread.

    Nothing is read before `open` has said which parts this rank needs.
    """

    def __init__(self, trajectory: Checkpoints, world: World, options: TeacherOptions, demands: Demands) -> None:
        self._trajectory, self._world, self._options, self._demands = trajectory, world, options, demands
        self._sharded = options.sharded(world)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher-reader", initializer=_give_way)
        self._ahead: OrderedDict[int, Future[Staged]] = OrderedDict()
        self._told: set[tuple[int, str]] = set()
        self._lock = threading.Lock()  # of _ahead: a server prepares from its request threads
        self.opened, self._closed = threading.Event(), threading.Event()

    def open(self, holder: Holder) -> None:
        """Read for holders like this one from now on."""
        self._holder = holder
        self.opened.set()

    def prepare(self, step: int) -> Future[Staged]:
        """Start reading the checkpoint of teacher step `step`, as soon as it is written."""
        with self._lock:
            future = self._ahead.get(step)
            # What failed may have been mended.
            if future is None or (future.done() and (future.cancelled() or future.exception() is not None)):
                future = self._thread.submit(self._read, step)
                future.add_done_callback(lambda done: self._report(step, done))
                self._ahead[step] = future
                while len(self._ahead) > STAGED + self._options.resident:
                    self._ahead.popitem(last=False)[1].cancel()
            return future

    def take(self, step: int) -> Staged:
        """The checkpoint of a step, waited for. Sharded, every rank raises if one does."""
        future = self.prepare(step)
        failure: Exception | None = None
        try:
            if self._options.wait_seconds is not None:
                self._trajectory.wait_for(step, self._options.wait_seconds)
            result = future.result()
        except Exception as error:  # raised below, when the other ranks know
            failure = error
        with self._lock:
            self._ahead.pop(step, None)
        if self._sharded and self._world.sum(int(failure is not None))[0] and failure is None:
            raise UserError(f"teacher.trajectory: another rank could not read the checkpoint of step {step}; see its message")
        if failure is not None:
            raise failure
        return result

    def close(self) -> None:
        self._closed.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    _holder: Holder

    def _read(self, step: int) -> Staged:
        while not self.opened.wait(POLL_SECONDS):
            if self._closed.is_set():
                raise CancelledError
        while self._options.wait_seconds is not None and not self._trajectory.written(step):
            # No deadline here: a refresh may take hours, and `rotate` counts its own wait. The event lets the process end.
            if self._closed.wait(POLL_SECONDS):
                raise CancelledError
        checkpoint = self._trajectory.checkpoint(step)
        self._demands.check(checkpoint)
        share, of = (self._world.rank, self._world.size) if self._sharded else (0, 1)
        check_files(checkpoint, share, of)
        tensors = read_parts(self._trajectory, checkpoint, self._holder.model, self._holder.parts)
        check_weights(tensors, checkpoint, self._options)
        staged = stage(tensors, self._world.device, self._options.dtype, on_device=self._options.resident > 1)
        hidden = self._holder.trial(staged, canary(checkpoint).to(self._world.device))
        if hidden is not None and not finite(hidden):
            raise not_finite(checkpoint)
        return Staged(checkpoint, staged, hidden is not None)

    def _report(self, step: int, done: Future[Staged]) -> None:
        """A checkpoint that cannot be read is told when it is read, which is before a step needs it; each message once."""
        error = None if done.cancelled() else done.exception()
        if error is not None and not isinstance(error, CancelledError) and (step, str(error)) not in self._told:
            self._told.add((step, str(error)))
            log.error("teacher: the checkpoint of step %d, which is to teach later, cannot be used: %s", step, error)


def check_weights(tensors: Mapping[str, Tensor], checkpoint: Checkpoint, options: TeacherOptions) -> None:
    """UserError where a weight is NaN or an infinity, or becomes one in the teacher's precision. 9 ms of 100 MB on a core."""
    largest = torch.finfo(options.dtype).max
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = (float(bound) for bound in tensor.aminmax())  # NaN, if any is
        if not (math.isfinite(low) and math.isfinite(high)):
            fix = "schedule another checkpoint, or fetch it again"
            raise UserError(f"{checkpoint.path}: step {checkpoint.step}: {name} holds NaN or an infinity; {fix}")
        if max(-low, high) > largest:
            what = f"{checkpoint.path}: step {checkpoint.step}: {name} has {max(-low, high):.3g}, beyond {options.precision}"
            raise UserError(f"teacher.precision: {what}; choose bf16 or fp32")


def stage(tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype, *, on_device: bool) -> dict[str, Tensor]:
    """Weights in the type that they will have, in memory of their own (files may go away), so that the commit is short.

    On a GPU in pinned host memory, or with on_device in the GPU's own, copied on a stream of its own. For a reader's thread.
    """
    cuda = device.type == "cuda"
    staged = {name: torch.empty(part.shape, dtype=dtype, pin_memory=cuda).copy_(part) for name, part in tensors.items()}
    if cuda and on_device:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            staged = {name: tensor.to(device, non_blocking=True) for name, tensor in staged.items()}
        stream.synchronize()
    return staged


def _give_way() -> None:
    """A low priority for this thread, where the system has one a thread: on a CPU, reading ahead slows the steps beside it (100
    MB read, hashed and copied by the side of a student on two cores: 1.3 times the step). Not the lowest, which may starve."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), READER_NICENESS)


def finite(tensor: Tensor) -> bool:
    return not tensor.numel() or all(map(math.isfinite, map(float, tensor.aminmax())))


def not_finite(checkpoint: Checkpoint) -> UserError:
    return UserError(f"{checkpoint.path}: its hidden states are not finite on a test batch; schedule another checkpoint")
