"""Where rank 0 sends the metrics of a run: metrics.jsonl always, and the trackers that telemetry.trackers names.

@trackers.register("mine")                 or by an entry point of the group megapd.trackers; then telemetry.trackers: [mine]
class Mine(Tracker):
    def __init__(self, run: Run) -> None: ...
"""

from __future__ import annotations

import netrc
import os
import secrets
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from megapd.config import public_tree
from megapd.files import write_atomic
from megapd.models import parameter_count
from megapd.registry import trackers
from megapd.training.folder import numbers
from megapd.training.run import Run


class Tracker:
    """A base class whose every method may be left out; made with the run, on rank 0, before its first step."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """A line of metrics after `step` student steps, kind train, eval or rotation."""

    def advance(self) -> None:
        """A student step was made."""

    def sync(self) -> None:
        """A checkpoint will be written: what was told lasts as long as it does."""

    def close(self) -> None: ...


@trackers.register("progress")
class ProgressBar(Tracker):
    """A bar on a terminal, if telemetry.progress is set."""

    def __init__(self, run: Run) -> None:
        hidden = None if run.config.telemetry.progress else True  # None: off a terminal
        self._bar = tqdm(
            total=run.steps, initial=run.start, desc=run.config.name, unit="step", disable=hidden, dynamic_ncols=True
        )

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        shown = {k: f"{v:.4g}" for k, v in values.items() if k in ("loss", "accuracy") and v is not None}
        if kind == "train":
            self._bar.set_postfix(shown, refresh=False)
        elif kind == "eval":
            self._say(f"step {step}: held-out " + ", ".join(f"{k} {v}" for k, v in shown.items()))
        elif kind == "rotation":
            self._say(f"step {step}: the teacher's step {values['teacher_step']} teaches from here")

    def advance(self) -> None:
        self._bar.update()

    def close(self) -> None:
        self._bar.close()

    def _say(self, text: str) -> None:
        if not self._bar.disable:
            self._bar.write(text, file=sys.stderr)


@trackers.register("wandb")
class Wandb(Tracker):
    """A page at wandb, as telemetry.wandb says; none of a run that is complete already."""

    def __init__(self, run: Run) -> None:
        self._page = None
        settings, folder = run.config.telemetry, run.config.folder
        if settings.wandb == "disabled" or run.start >= run.steps:
            return
        import wandb  # two seconds of imports that only rank 0 of a logged run should pay

        online = settings.wandb == "auto" and _logged_in(wandb.setup().settings.base_url)
        identity = folder / "wandb_id"  # a resumed run goes on where its page stopped
        if not identity.exists():
            write_atomic(identity, secrets.token_hex(4))
        summary = {"parameters": parameter_count(run.engine.learner)[0], "ranks": run.world.size}
        self._page = wandb.init(
            id=identity.read_text(),
            resume="allow",
            project=settings.project,
            name=run.config.name,
            dir=folder,
            mode="online" if online else "offline",
            config={**public_tree(run.config), "summary": summary},
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._page.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._page is not None:
            self._page.log({**numbers(kind, values), "step": step})

    def close(self) -> None:
        if self._page is not None:
            self._page.finish()


def _logged_in(base_url: str) -> bool:
    """Whether wandb has credentials: its variable, or an entry for its host in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(urlsplit(base_url).hostname or "") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
