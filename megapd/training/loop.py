"""The training loop."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor

from megapd.errors import Diverged
from megapd.schedule.plan import Change
from megapd.training.evaluation import held_out
from megapd.training.fallback import take_signals
from megapd.training.feed import BatchFeed
from megapd.training.learning_rate import learning_rate
from megapd.training.meter import Meter
from megapd.training.run import Run, checkpoint_config
from megapd.training.stop import StopRequest
from megapd.trajectory import CheckpointTimeout, write_checkpoint

log = logging.getLogger(__name__)


def train(run: Run) -> bool:
    """Train from run.start to the last step; False if a stop request ended it early, with a checkpoint saved."""
    config, world, engine, telemetry = run.config, run.world, run.engine, run.telemetry
    steps = config.training.steps
    feed = BatchFeed(
        run.task,
        engine.tiling.rows(world.rank),
        range(run.start, steps),
        max(config.training.prefetch, config.teacher.depth if config.teacher is not None else 0),
        world.device,
        built=None if run.stream is None else run.stream.request,
    )
    stop = StopRequest(config.folder / "stop", watches_file=run.writes)
    eval_micro = config.evaluation.micro_batch or engine.tiling.micro_batch
    meter = Meter(run)
    step, stopped = run.start, False
    try:
        while step < steps:
            # The batch, its global count of labelled positions, whether any rank was asked to stop, or the schedule changes.
            batches = feed.get(step)
            change = run.changes.next(step) if run.changes is not None else None
            labelled, stops, changes = world.sum(sum(b.labelled for b in batches), int(stop.pending()), int(change is not None))
            if changes:
                take_change(run, change)
            if stops or not teacher_came(run, step, stop):
                stopped = True
                break

            # The teacher of this step; a rotation is written where it begins.
            if run.stream is not None:
                announce_rotation(run, step)
            signals, source = take_signals(run, step, batches)

            # Forward and backward of each micro-batch, then one update.
            sums = torch.zeros(3, dtype=torch.float64, device=world.device)
            for batch, signal in zip(batches, signals, strict=False):
                sums += engine.accumulate(batch, signal, labelled)
            lr = learning_rate(config.lr, config.optimizer.lr, step, steps)
            applied = engine.step(lr)
            count_nonfinite(run, applied, sums, step)
            step += 1
            run.state["step"] = step

            # What is due at this step.
            if due(step, config.telemetry.every, steps):
                line = meter.line(sums, labelled, step, lr, source)
                tell(run, "train", step, line)
            telemetry.tick()
            if due(step, config.evaluation.every, steps):
                line = held_out(run.task, config, world, eval_micro, engine.evaluate)
                tell(run, "eval", step, line)
            if step in config.trajectory.steps or (config.trajectory.every and due(step, config.trajectory.every, steps)):
                write_trajectory(run, step)
            if step < steps and due(step, config.checkpoint.every, steps):
                save(run)
        if step > run.saved:
            save(run)
    finally:
        stop.close()
        feed.close()
    if stopped and run.writes:
        log.warning(
            "stopped by %s at step %d of %d; start the same command again to continue", stop.reason or "another rank", step, steps
        )
    return not stopped


def take_change(run: Run, change: Change | None) -> None:
    """What rank 0 has heard of, taken in by all ranks at the same step, long before the step at which it begins."""
    assert run.plan is not None
    run.plan.take(run.world.gather(change)[0])
    run.state["decisions"] = run.plan.known


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens each `every` steps, and at the last, happens after `step` steps."""
    return step == last or (every > 0 and step % every == 0)


def teacher_came(run: Run, step: int, stop: StopRequest) -> bool:
    """Wait until every rank can see the checkpoint that teaches `step`; False if the run was asked to stop meanwhile.

    Only `follow` waits: its teacher may still be training. All ranks poll together, so that they stop, or give up, together.
    """
    seconds = patience(run, step)
    if run.stream is None or seconds is None:
        return True
    deadline = time.monotonic() + seconds
    while True:
        ready, stops, late = run.world.sum(int(run.stream.ready(step)), int(stop.pending()), int(time.monotonic() > deadline))
        if stops:
            return False
        if ready == run.world.size:
            return True
        if late:
            wanted = run.plan.checkpoint_at(step) if run.plan is not None else step
            raise CheckpointTimeout(
                f"schedule.timeout_seconds: no checkpoint of the teacher's step {wanted} after {seconds:g} s; "
                f"is the teacher running, and does it write this step?"
            )
        time.sleep(0.1)


def patience(run: Run, step: int) -> float | None:
    """Seconds to wait for the teacher of `step` to be written; None: all of the schedule's are there."""
    return None if run.plan is None else run.plan.version_at(step).timeout


def announce_rotation(run: Run, step: int) -> None:
    """Where another checkpoint begins to teach, hold it to what was recorded, and record it."""
    assert run.stream is not None
    assert run.record is not None
    assert run.plan is not None
    if step == 0 or run.plan.checkpoint_at(step) != run.plan.checkpoint_at(step - 1):
        checkpoint = run.stream.teacher(step)
        run.record.confirm(checkpoint)
        run.telemetry.write("rotation", step, teacher_step=checkpoint.step, teacher=checkpoint.digest)


def count_nonfinite(run: Run, applied: bool, sums: Tensor, step: int) -> None:
    """Count skipped updates; raise Diverged after training.max_nonfinite non-finite ones in a row.

    In fp16 an overflow of the scaled gradients with a finite loss is how the loss scale is found, not a divergence.
    """
    if applied:
        run.state["nonfinite_in_a_row"] = 0
        return
    loss_broke = run.world.sum(int(not bool(torch.isfinite(sums).all())))[0] > 0
    if run.config.training.precision == "fp16" and not loss_broke:
        run.state["overflows"] += 1
        return
    run.state["nonfinite"] += 1
    run.state["nonfinite_in_a_row"] += 1
    if run.writes:
        log.warning("step %d: %s not finite, update skipped", step, "loss" if loss_broke else "gradients")
    if run.state["nonfinite_in_a_row"] >= run.config.training.max_nonfinite:
        raise Diverged(
            f"{run.state['nonfinite_in_a_row']} steps in a row were not finite, up to step {step} (training.max_nonfinite); "
            f"lower optimizer.lr, set training.clip, or resume from an earlier checkpoint"
        )


def write_trajectory(run: Run, step: int) -> None:
    """The weights of this step for later students; only rank 0 keeps them, all ranks gather."""
    if run.writes:
        write_checkpoint(
            run.config.folder / "trajectory",
            step,
            run.engine.weights(),
            config=checkpoint_config(run.config, run.task),
            vocabulary=run.task.vocabulary_digest,
            metrics=dict(run.telemetry.latest),
            shard_bytes=run.config.trajectory.shard_bytes,
        )
    else:
        for _ in run.engine.weights():
            continue
    run.world.barrier()


def tell(run: Run, kind: str, step: int, values: dict[str, Any]) -> None:
    """Write a line of metrics; what the decider, or the scheduler, makes of it reaches all ranks with their next step."""
    run.telemetry.write(kind, step, **values)
    if run.changes is not None:
        run.changes.report(kind, step, values)


def save(run: Run) -> None:
    if run.changes is not None:
        run.changes.sync()
    run.telemetry.sync()
    run.store.save(run.engine, run.state["step"], dict(run.state))
    run.saved = run.state["step"]
