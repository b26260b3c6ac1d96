"""What a run tells of itself: the numbers of its lines of metrics, and to whom they go."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from megapd.config import TelemetryConfig
from megapd.tasks import tokens_per_sample
from megapd.training.folder import METRICS, MetricsFile, numbers, recorded
from megapd.training.run import Callback, Run, StepResult, due
from megapd.training.trackers import Tracker
from megapd.trajectory import Checkpoint

# Dense bf16 peaks in TFLOP/s, from the vendors' data sheets.
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "MI300X": 1307.0}


class Meter(Callback):
    """Adds to the metrics of a step that telemetry writes: tokens a second and seconds waited since the last, seconds in the
    loop, the MFU."""

    def start(self, run: Run) -> None:
        self._step, self._data, self._teacher = run.start, 0.0, 0.0
        tokens = tokens_per_sample(run.task)
        self._tokens, share = run.config.training.global_batch * tokens, run.task.labelled_per_sample / tokens
        self._flops = run.config.model.flops_per_token(classes=run.task.classes, length=round(tokens), labelled_share=share)
        peak = _peak_tflops(run.config.telemetry, run.world.device)
        self._peak_flops = None if peak is None else peak * 1e12 * run.world.size
        lines = recorded(run.config.folder / METRICS, run.start) if run.writes else []
        seconds_before = max((line["seconds"] for line in lines if "seconds" in line), default=0.0)
        self._time = time.perf_counter()
        self._began = self._time - seconds_before  # as if those before a resume had been now

    def before_step(self, run: Run, step: int) -> None:
        if step == run.start:
            self._time = time.perf_counter()  # the rate is the loop's: what else started, such as a tracker, took its time

    def after_step(self, run: Run, result: StepResult) -> None:
        if result.metrics is None or not due(result.step, run.config.telemetry.every, run.steps):
            return
        now = time.perf_counter()
        rate = (result.step - self._step) * self._tokens / (now - self._time)
        data, teacher = run.waited.data - self._data, run.waited.teacher - self._teacher
        self._step, self._time, self._data, self._teacher = result.step, now, run.waited.data, run.waited.teacher
        result.metrics |= {"tok_per_sec": rate, "seconds": now - self._began, "data_wait": data, "teacher_wait": teacher}
        if self._peak_flops is not None:
            result.metrics["mfu"] = rate * self._flops / self._peak_flops


class Telemetry(Callback):
    """Sends lines of metrics to what decides on the schedule, and on rank 0 to the trackers."""

    def __init__(self, trackers: Sequence[Callable[[Run], Tracker]]) -> None:
        """trackers: that of metrics.jsonl aside, each made of the run on rank 0 when it starts."""
        self._makers, self._opened = trackers, ExitStack()
        self._file: MetricsFile | None = None
        self._trackers: list[Tracker] = []

    def start(self, run: Run) -> None:
        self._every, self._steps = run.config.telemetry.every, run.steps
        if run.writes:
            self._file = run.folder.open_metrics(run.start)
            self._opened.callback(self._file.close)
            for make in self._makers:
                self._trackers.append(make(run))
                self._opened.callback(self._trackers[-1].close)

    def due(self, step: int) -> bool:
        return due(step, self._every, self._steps)

    def after_step(self, run: Run, result: StepResult) -> None:
        if result.metrics is not None and self.due(result.step):
            self._write(run, "train", result.step, result.metrics)
            run.teaching.report("train", result.step, result.metrics)
        for tracker in self._trackers:
            tracker.advance()

    def evaluated(self, run: Run, step: int, values: dict[str, float]) -> None:
        self._write(run, "eval", step, values)
        run.teaching.report("eval", step, values)

    def rotated(self, run: Run, step: int, checkpoint: Checkpoint) -> None:
        self._write(run, "rotation", step, {"teacher_step": checkpoint.step, "teacher": checkpoint.digest})

    def state_dict(self) -> dict[str, Any]:
        """Nothing: but no checkpoint is ahead of its lines of metrics, from which a resumed run goes on."""
        for log in self._logs():
            log.sync()
        return {}

    def close(self) -> None:
        self._opened.close()

    def _write(self, run: Run, kind: str, step: int, values: Mapping[str, Any]) -> None:
        run.latest |= numbers(kind, values)
        for log in self._logs():
            log.write(kind, step, values)

    def _logs(self) -> list[MetricsFile | Tracker]:
        return [*([] if self._file is None else [self._file]), *self._trackers]


def _peak_tflops(settings: TelemetryConfig, device: torch.device) -> float | None:
    """Peak of one device in TFLOP/s: telemetry.peak_tflops, else known by name, else None."""
    if settings.peak_tflops is not None or device.type != "cuda":
        return settings.peak_tflops
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)
