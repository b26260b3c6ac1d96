"""Metrics of a run: metrics.jsonl, wandb, the progress bar, throughput and MFU. Rank 0 alone writes."""

from __future__ import annotations

import itertools
import json
import logging
import math
import netrc
import os
import secrets
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from tqdm import tqdm

from megapd.config import Config
from megapd.files import write_atomic

log = logging.getLogger(__name__)

# Dense bf16 peaks in TFLOP/s, from the vendors' data sheets.
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0, "MI300X": 1307.0}


def peak_tflops(config: Config, device: torch.device) -> float | None:
    """Peak of one device in TFLOP/s: telemetry.peak_tflops, else known by name, else None."""
    if config.telemetry.peak_tflops is not None:
        return config.telemetry.peak_tflops
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


class Metrics:
    """metrics.jsonl: one JSON object a line, `kind` and `step` first. Numbers that are not finite become null."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        """Keeps the lines up to student step `resumed_at`: a killed run wrote further than its checkpoint."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _whole_lines(path) if _belongs_before(json.loads(line), resumed_at)]
        write_atomic(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")

    def write(self, kind: str, step: int, **values: Any) -> None:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **clean}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    *lines, partial = path.read_text(errors="replace").split("\n")
    whole = list(itertools.takewhile(_is_record, lines))
    if partial or len(whole) < len(lines):
        # After a power cut, what followed the last checkpoint's fsync may be missing or garbled. It will be written again.
        log.warning("%s: dropping what follows its line %d, which is damaged", path, len(whole))
    return whole


def _is_record(line: str) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and {"kind", "step"} <= record.keys()


def _belongs_before(record: dict[str, Any], resumed_at: int) -> bool:
    # A rotation is written when its step begins, the others when their step is done.
    return record["step"] < resumed_at if record["kind"] == "rotation" else record["step"] <= resumed_at


class Telemetry:
    """Where the loop reports to. On other ranks than 0 every method does nothing."""

    def __init__(self, config: Config, active: bool, resumed_at: int, summary: dict[str, Any]) -> None:
        self.latest: dict[str, float] = {}
        self._active = active
        self._seconds_before = 0.0
        self._started = time.perf_counter()
        if not active:
            return
        path = config.folder / "metrics.jsonl"
        self._seconds_before = _last_seconds(path, resumed_at)
        self._metrics = Metrics(path, resumed_at)
        self._wandb = _start_wandb(config, summary) if resumed_at < config.training.steps else None
        self._bar = tqdm(
            total=config.training.steps,
            initial=resumed_at,
            desc=config.name,
            unit="step",
            disable=None if config.telemetry.progress else True,  # None: only on a terminal
            dynamic_ncols=True,
        )

    @property
    def seconds(self) -> float:
        """Wall-clock seconds in the loop, those before a resume included."""
        return self._seconds_before + time.perf_counter() - self._started

    def write(self, kind: str, step: int, **values: Any) -> None:
        if not self._active:
            return
        self._metrics.write(kind, step, **values)
        numbers = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, (int, float))}
        self.latest.update(numbers)
        if self._wandb is not None:
            self._wandb.log({**numbers, "step": step})
        shown = {k: f"{v:.4g}" for k, v in values.items() if k in ("loss", "accuracy") and v is not None}
        if kind == "train":
            self._bar.set_postfix(shown, refresh=False)
        elif kind == "eval":
            self._say(f"step {step}: held-out " + ", ".join(f"{k} {v}" for k, v in shown.items()))
        elif kind == "rotation":
            self._say(f"step {step}: the teacher's step {values['teacher_step']} teaches from here")

    def tick(self) -> None:
        if self._active:
            self._bar.update()

    def sync(self) -> None:
        if self._active:
            self._metrics.sync()

    def close(self) -> None:
        if self._active:
            self._bar.close()
            self._metrics.close()
            if self._wandb is not None:
                self._wandb.finish()

    def _say(self, text: str) -> None:
        if not self._bar.disable:
            self._bar.write(text)


def _last_seconds(path: Path, resumed_at: int) -> float:
    records = (json.loads(line) for line in _whole_lines(path))
    return max((r["seconds"] for r in records if "seconds" in r and r["step"] <= resumed_at), default=0.0)


def _start_wandb(config: Config, summary: dict[str, Any]) -> Any | None:
    if config.telemetry.wandb == "disabled":
        return None
    import wandb  # two seconds of imports that only rank 0 of a logged run should pay

    online = config.telemetry.wandb == "auto" and _logged_in(wandb.setup().settings.base_url)
    identity = config.folder / "wandb_id"  # a resumed run goes on where its page stopped
    if not identity.exists():
        write_atomic(identity, secrets.token_hex(4))
    run = wandb.init(
        id=identity.read_text(),
        resume="allow",
        project=config.telemetry.project,
        name=config.name,
        dir=config.folder,
        mode="online" if online else "offline",
        config={**config.model_dump(mode="json"), "summary": summary},
        settings=wandb.Settings(silent=True, console="off"),
    )
    run.define_metric("*", step_metric="step")
    return run


def _logged_in(base_url: str) -> bool:
    """Whether wandb has credentials: its variable, or an entry for its host in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(urlsplit(base_url).hostname or "") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
