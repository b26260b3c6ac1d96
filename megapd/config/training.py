"""Sections of the run itself: optimizer, lr, training, checkpoint, trajectory, evaluation, telemetry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megapd.config.base import Section, problem

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerConfig(Section):
    kind: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0.0, allow_inf_nan=False)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0.0)
    weight_decay: float = Field(0.0, ge=0.0, description="applied to matrices, not to biases and norms")
    momentum: float = Field(0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _has_momentum(self) -> OptimizerConfig:
        if self.kind == "adamw" and self.momentum:
            raise problem("momentum", "AdamW has none; set optimizer.betas, or choose sgd", self.momentum)
        return self


class LearningRateConfig(Section):
    """Warm-up, then a decay to `final` times the peak."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup: float = Field(0.0, ge=0.0, description="steps; below 1, a share of the run")
    final: float = Field(0.0, ge=0.0, le=1.0, description="learning rate at the end, as a share of the peak")
    decay: float = Field(0.2, gt=0.0, description="wsd: steps of the decay at the end; below 1, a share of the run")

    def check_steps(self, steps: int) -> None:
        """ValueError unless warm-up and decay fit into a run of `steps`."""
        for key, phase in (("warmup", self.warmup), ("decay", self.decay)):
            if phase > steps:
                raise ValueError(f"lr.{key}: {phase:g} steps exceed training.steps {steps}")


class TrainingConfig(Section):
    steps: int = Field(1000, ge=1)
    global_batch: int = Field(256, ge=1, description="samples a step, over all ranks")
    micro_batch: int | None = Field(None, ge=1, description="samples a forward and rank; default: no accumulation")
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    clip: float = Field(0.0, ge=0.0, description="largest gradient norm; 0: no clipping")
    max_nonfinite: int = Field(10, ge=1, description="stop after this many non-finite steps in a row")
    prefetch: int = Field(2, ge=1, description="steps whose batches are built ahead")
    deepspeed: Path | None = Field(None, description="JSON merged under what megapd sets; default configs/deepspeed")
    callbacks: tuple[str, ...] = Field((), description="names of callbacks that installed packages register")

    @model_validator(mode="after")
    def _divides(self) -> TrainingConfig:
        if self.micro_batch is not None and self.global_batch % self.micro_batch:
            message = f"{self.micro_batch} does not divide training.global_batch {self.global_batch}"
            raise problem("micro_batch", message, self.micro_batch)
        return self


class CheckpointConfig(Section):
    """Resumable checkpoints: parameters, optimizer, counters."""

    every: int = Field(1000, ge=0, description="steps between checkpoints; 0: only when stopped and at the end")
    keep: int = Field(2, ge=1)
    resume: bool = Field(True, description="continue the run's folder where it stopped")


class TrajectoryWriterConfig(Section):
    """Weights-only checkpoints for later students."""

    every: int = Field(0, ge=0, description="steps between checkpoints; 0: only those of `steps`")
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((), description="further steps at which one is written")
    shard_bytes: int = Field(2 << 30, ge=1 << 12)

    def check_steps(self, steps: int) -> None:
        """ValueError unless every checkpoint asked for lies within a run of `steps`."""
        late = [step for step in self.steps if step > steps]
        if late:
            raise ValueError(f"trajectory.steps: {late} lie beyond training.steps {steps}")


class EvaluationConfig(Section):
    every: int = Field(0, ge=0, description="steps between evaluations on held-out data; 0: only at the end")
    samples: int = Field(1024, ge=1)
    micro_batch: int | None = Field(None, ge=1, description="samples a forward; default: the training micro-batch")


class TelemetryConfig(Section):
    every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    wandb: Literal["auto", "offline", "disabled"] = Field("auto", description="auto: online when logged in, else offline")
    project: str = "megapd"
    progress: bool = True
    trackers: tuple[str, ...] = Field(("wandb", "progress"), description="where metrics go beside metrics.jsonl")
    peak_tflops: float | None = Field(None, gt=0.0, description="a device's peak, for the MFU; default: known by its name")
