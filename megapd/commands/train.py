"""`megapd train`: a teacher or a student, from its configuration to its last step."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from megapd.config import Config, dump
from megapd.training import Callback, Run, train


class Announcement(Callback):
    """Rank 0 shows what it trains, and from where on."""

    def start(self, run: Run) -> None:
        if not run.writes:
            return
        console, folder = Console(stderr=True, soft_wrap=True), run.config.folder
        console.print(escape(dump(run.config).rstrip()), highlight=False)
        if run.start >= run.steps:
            console.print(f"{folder} is complete: {run.start} of {run.steps} steps", highlight=False)
        elif run.start:
            console.print(f"resuming {folder} at step {run.start}", highlight=False)


def train_command(config: Config, allow_change: list[str], take_over: bool) -> int:
    train(config, [Announcement()], allow_change=allow_change, take_over=take_over)
    return 0
