"""The callback `rotations`."""

import json
from pathlib import Path
from typing import Any

from megapd import Callback, Run
from megapd.trajectory import Checkpoint


class Rotations(Callback):
    """Writes which checkpoint began to teach when into the run's folder, at its end."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def rotated(self, run: Run, step: int, checkpoint: Checkpoint) -> None:
        self.seen.append((step, checkpoint.step))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]

    def end(self, run: Run, *, finished: bool) -> None:
        if run.writes:
            Path(run.config.folder / "rotations.json").write_text(json.dumps(self.seen))
