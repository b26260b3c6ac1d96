"""Carried out of megapd/schedule/command.py."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megapd.commands.scheduler import _existing
from megapd.config import Config, SchedulerConfig
from megapd.scheduler.store.database import Store

if TYPE_CHECKING:
    from megapd.scheduler.registry.files import Registry


# ---------------------------------------------------------------------------------------------------------- trajectories


def import_checkpoints(
    config: Config, source: str, *, name: str | None = None, probe_samples: int = 0, watch: bool = False
) -> int:
    """`megapd trajectory import FOLDER|hf:REPO [--as NAME] [--probe SAMPLES] [--watch]`.

    Into the service at scheduler.url, else into scheduler.database. probe_samples: held-out samples of the configuration's task
    on which each checkpoint's loss is measured, 0: none. watch: go on until SIGTERM or SIGINT with what a teacher writes.
    """
    from megapd.scheduler.registry.files import import_trajectory, watch_trajectory

    probe = None
    if probe_samples:
        from megapd.scheduler.registry.probe import TaskProbe

        probe = TaskProbe(config, probe_samples)
    with _registry(config.scheduler) as registry:
        if watch:
            with _until_signalled() as stop:
                watch_trajectory(
                    registry, source, stop, name=name, probe=probe, told=lambda step: print(f"step {step}", flush=True)
                )
            return 0
        steps = config.teacher.steps if config.teacher is not None else ()
        done = import_trajectory(registry, source, steps=steps, name=name, probe=probe)
    print(f"{done.digest}  {len(done.added)} checkpoints added, {len(done.known)} known")
    return 0


def verify_checkpoints(config: Config, reference: str, *, accept: bool = False) -> int:
    """`megapd trajectory verify NAME [--accept]` of a registered trajectory; 1 if one is flagged and not accepted."""
    from megapd.scheduler.registry.files import verify_trajectory

    with _registry(config.scheduler, existing=True) as registry:
        flagged = verify_trajectory(registry, reference, accept=accept)
    for checkpoint in flagged:
        for flag in checkpoint["flags"]:
            accepted = f" (accepted by {flag['accepted_by']})" if flag["accepted_by"] else ""
            print(f"step {checkpoint['step']}: {flag['kind']}: {flag['detail']}{accepted}")
    open_flags = [flag for checkpoint in flagged for flag in checkpoint["flags"] if flag["accepted_by"] is None]
    print(f"{reference}: {len(flagged)} checkpoints flagged, {len(open_flags)} flags not accepted")
    return 1 if open_flags else 0


@contextlib.contextmanager
def _registry(settings: SchedulerConfig, *, existing: bool = False) -> Iterator[Registry]:
    from megapd.scheduler.registry.files import LocalRegistry, RemoteRegistry

    if settings.url is not None:
        with contextlib.closing(RemoteRegistry(settings)) as remote:
            yield remote
    else:
        with contextlib.closing(_existing(settings) if existing else Store(settings.database)) as store:
            yield LocalRegistry(store)


@contextlib.contextmanager
def _until_signalled() -> Iterator[threading.Event]:
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
