"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from megapd.config import LearningRateConfig


def learning_rate(settings: LearningRateConfig, peak: float, step: int, steps: int) -> float:
    """Learning rate of the 0-based update `step` of `steps`.

    Warm-up rises linearly and reaches the peak at update `warmup`. Then: constant; linear or cosine down to final * peak at
    the last update; wsd (warm-up, stable, decay): constant until the last `decay` updates, then linear to final * peak.
    """
    warmup = _in_steps(settings.warmup, steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if settings.kind == "constant":
        return peak
    start = max(warmup, steps - _in_steps(settings.decay, steps)) if settings.kind == "wsd" else warmup
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if settings.kind == "cosine" else 1.0 - progress
    return peak * (settings.final + (1.0 - settings.final) * remaining)


def _in_steps(value: float, steps: int) -> int:
    """A number of steps, or below 1 a share of the run."""
    return round(value * steps) if value < 1.0 else round(value)
