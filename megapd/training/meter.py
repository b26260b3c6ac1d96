"""Carried out of megapd/training/loop.py."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megapd.training.run import Run
from megapd.training.telemetry import peak_tflops


class Meter:
    """The numbers of a line of metrics: global means of this step, and throughput since the last line."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._peak = peak_tflops(run.config, run.world.device)
        self._step, self._time = run.start, time.perf_counter()

    def line(self, sums: Tensor, labelled: int, step: int, lr: float, source: str) -> dict[str, Any]:
        """source: where the step's signals came from, see `take_signals`."""
        run = self._run
        if run.world.size > 1:
            dist.all_reduce(sums)
        divergence, cross_entropy, correct = (sums / max(labelled, 1)).tolist()
        now = time.perf_counter()
        tokens = run.config.training.global_batch * run.task.length
        rate = (step - self._step) * tokens / (now - self._time)
        self._step, self._time = step, now
        values: dict[str, Any] = {"loss": cross_entropy if source == "labels" else self._loss(divergence, cross_entropy)}
        if run.config.teacher is not None and run.config.teacher.on_failure != "wait":
            values |= {key: run.state[key] for key in ("steps_from_cache", "steps_from_labels")}
        if run.plan is not None:
            values |= {"divergence": divergence, "teacher_step": run.plan.checkpoint_at(step - 1)}
        values |= {"cross_entropy": cross_entropy, "accuracy": correct, "lr": lr, "grad_norm": run.engine.grad_norm}
        values |= {"labelled": labelled, "tokens": step * tokens, "nonfinite": run.state["nonfinite"]}
        values |= {"overflows": run.state["overflows"], "tok_per_sec": rate, "seconds": run.telemetry.seconds}
        if self._peak is not None:
            values["mfu"] = rate * run.flops_per_token / (self._peak * 1e12 * run.world.size)
        return values

    def _loss(self, divergence: float, cross_entropy: float) -> float:
        loss = self._run.config.loss
        scale = loss.student_temperature**2 if loss.scale_t2 else 1.0
        return loss.alpha * cross_entropy + (1.0 - loss.alpha) * scale * divergence
