"""`megapd scheduler` and `megapd trajectory import|verify`: the verbs, as functions that print and return the exit code."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megapd.config import Config
from megapd.errors import UserError
from megapd.schedule import journal
from megapd.schedule.settings import Scheduler
from megapd.schedule.store import Conflict, NotFound, Store

if TYPE_CHECKING:
    from megapd.schedule.registry import Registry


def settings_of(config: Config) -> Scheduler:
    """The section `scheduler`, its defaults where the configuration has none."""
    return getattr(config, "scheduler", None) or Scheduler()


def serve_scheduler(config: Config) -> int:
    """`megapd scheduler CONFIG`: answer until SIGTERM or SIGINT."""
    from megapd.schedule.service import serve

    settings = settings_of(config)
    scheme = "http" if settings.certificate is None else "https"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    serve(settings, ready=lambda port: print(f"megapd: scheduler on {scheme}://{host}:{port}", file=sys.stderr, flush=True))
    return 0


def create_token(config: Config, role: str, name: str | None) -> int:
    """`megapd scheduler token ROLE [--name NAME]`: print a new token, which is not kept. The database's owner alone can do
    this."""
    if role not in journal.ROLES:
        raise UserError(f"role: {role!r} is none; there are {', '.join(journal.ROLES)}")
    with contextlib.closing(Store(settings_of(config).database)) as store:
        try:
            token = store.write(lambda connection: journal.create_token(connection, role, name or _free(store, role)))
        except Conflict as error:
            raise UserError(f"{error}") from error
    print(token)
    return 0


def revoke_token(config: Config, name: str) -> int:
    """`megapd scheduler revoke NAME`."""
    with contextlib.closing(Store(settings_of(config).database)) as store:
        try:
            store.write(lambda connection: journal.revoke_token(connection, name))
        except NotFound as error:
            raise UserError(f"{error}") from error
    return 0


def list_tokens(config: Config) -> int:
    """`megapd scheduler tokens`: names and roles."""
    with contextlib.closing(Store(settings_of(config).database)) as store:
        for token in store.read(journal.list_tokens):
            print(f"{token['name']}  {token['role']}")
    return 0


def _free(store: Store, role: str) -> str:
    taken = {token["name"] for token in store.read(journal.list_tokens)}
    numbered: Sequence[str] = [role, *(f"{role}-{number}" for number in range(2, len(taken) + 3))]
    return next(name for name in numbered if name not in taken)


# ---------------------------------------------------------------------------------------------------------- trajectories


def import_checkpoints(
    config: Config, source: str, *, name: str | None = None, probe_samples: int = 0, watch: bool = False
) -> int:
    """`megapd trajectory import FOLDER|hf:REPO [--name NAME] [--probe SAMPLES] [--watch]`.

    Into the service at scheduler.url, else into scheduler.database. probe_samples: held-out samples of the configuration's task
    on which each checkpoint's loss is measured, 0: none. watch: go on until SIGTERM or SIGINT with what a teacher writes.
    """
    from megapd.schedule.registry import import_trajectory, watch_trajectory

    probe = None
    if probe_samples:
        from megapd.schedule.probe import TaskProbe

        probe = TaskProbe(config, probe_samples)
    with _registry(settings_of(config)) as registry:
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
    from megapd.schedule.registry import verify_trajectory

    with _registry(settings_of(config)) as registry:
        flagged = verify_trajectory(registry, reference, accept=accept)
    for checkpoint in flagged:
        for flag in checkpoint["flags"]:
            accepted = f" (accepted by {flag['accepted_by']})" if flag["accepted_by"] else ""
            print(f"step {checkpoint['step']}: {flag['kind']}: {flag['detail']}{accepted}")
    open_flags = [flag for checkpoint in flagged for flag in checkpoint["flags"] if flag["accepted_by"] is None]
    print(f"{reference}: {len(flagged)} checkpoints flagged, {len(open_flags)} flags not accepted")
    return 1 if open_flags else 0


@contextlib.contextmanager
def _registry(settings: Scheduler) -> Iterator[Registry]:
    from megapd.schedule.registry import LocalRegistry, RemoteRegistry

    if settings.url is not None:
        try:
            token = None if settings.token is None else settings.token.read_text().strip()
        except OSError as error:
            raise UserError(
                f"scheduler.token: {settings.token}: {error.strerror or error}; name a file that can be read"
            ) from error
        with contextlib.closing(RemoteRegistry(settings.url, token, settings.root_certificate)) as remote:
            yield remote
    else:
        with contextlib.closing(Store(settings.database)) as store:
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
