"""A callback with a state, on which what the run learns depends."""

from __future__ import annotations

from typing import Any

import torch

import megapd


class Noise(megapd.Callback):
    """Moves the weights by random numbers of its own before each step, and stops the run once; its numbers are on record."""

    def __init__(self, stop_at: int | None = None) -> None:
        self._generator, self._stop_at = torch.Generator().manual_seed(5), stop_at

    def before_step(self, run: megapd.Run, step: int) -> None:
        with torch.no_grad():
            for parameter in run.engine.learner.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=self._generator))

    def after_step(self, run: megapd.Run, result: megapd.StepResult) -> None:
        if result.metrics is not None:
            result.metrics["noise"] = self._generator.get_state().sum().item()
        if result.step == self._stop_at:
            run.stop.request("a callback")

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])
