"""`megapd scheduler`, `megapd schedule` and `megapd trajectory import|verify`: functions that print and return the exit code."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import yaml
from sqlalchemy import make_url

from megapd.config import Config, Scheduler
from megapd.errors import UserError
from megapd.schedule import journal, runs
from megapd.schedule.http import Api, told
from megapd.schedule.store import Conflict, NotFound, Store, StoreError

if TYPE_CHECKING:
    from megapd.schedule.registry import Registry

RETRY_SECONDS = 10.0  # a command waits this long for a service that is away
PAGE = 1000


def serve_scheduler(config: Config) -> int:
    """`megapd scheduler CONFIG`: answer until SIGTERM or SIGINT."""
    from megapd.schedule.service import serve

    settings = config.scheduler
    scheme = "http" if settings.certificate is None else "https"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    serve(settings, ready=lambda port: print(f"megapd: scheduler on {scheme}://{host}:{port}", file=sys.stderr, flush=True))
    return 0


def create_token(config: Config, role: str, name: str | None) -> int:
    """`megapd scheduler token ROLE`: print a new token, of which a hash is kept. The database's owner alone can do this."""
    if role not in journal.ROLES:
        raise UserError(f"role: {role!r} is none; there are {', '.join(journal.ROLES)}")
    with contextlib.closing(Store(config.scheduler.database)) as store:
        try:
            token = store.write(lambda connection: journal.create_token(connection, role, name or _free(store, role)))
        except Conflict as error:
            raise UserError(f"{error}") from error
    print(token)
    return 0


def revoke_token(config: Config, name: str) -> int:
    """`megapd scheduler revoke NAME`."""
    with contextlib.closing(_existing(config.scheduler)) as store:
        try:
            store.write(lambda connection: journal.revoke_token(connection, name))
        except NotFound as error:
            raise UserError(f"{error}") from error
    return 0


def list_tokens(config: Config) -> int:
    """`megapd scheduler tokens`: names and roles."""
    with contextlib.closing(_existing(config.scheduler)) as store:
        for token in store.read(journal.list_tokens):
            print(f"{token['name']}  {token['role']}")
    return 0


def _free(store: Store, role: str) -> str:
    taken = {token["name"] for token in store.read(journal.list_tokens)}
    numbered: Sequence[str] = [role, *(f"{role}-{number}" for number in range(2, len(taken) + 3))]
    return next(name for name in numbered if name not in taken)


# ------------------------------------------------------------------------------------------------------------- schedules


def show_schedule(config: Config, run: str) -> int:
    """`megapd schedule show RUN`: the newest version, where the run is, and who teaches it."""
    with _runs(config.scheduler) as known:
        found, versions = known.find(run), known.schedules(run)
    done = "nothing reported yet" if found["step"] < 0 else f"{found['step']} of {found['steps']} steps done"
    print(f"{run}: {done}, {found['decisions']} decisions, replicas: {', '.join(found['endpoints']) or 'none'}")
    if not versions:
        print("no schedule yet")
        return 0
    print(_version_line(versions[-1], found["steps"]))
    print(yaml.safe_dump(versions[-1]["document"], sort_keys=False).rstrip())
    return 0


def schedule_history(config: Config, run: str) -> int:
    """`megapd schedule history RUN`: all versions, and all decisions with what they rest on."""
    with _runs(config.scheduler) as known:
        found, versions, decisions = known.find(run), known.schedules(run), known.decisions(run)
    for version in versions:
        print(_version_line(version, found["steps"]))
    for decision in decisions:
        begin = runs.begins(decision)
        print(
            f"decision {decision['sequence']}: teacher step {decision['checkpoint']} from student step {begin}, "
            f"{decision['reason']} at step {decision['step']}: {json.dumps(decision['evidence'])}"
        )
    if not versions and not decisions:
        print(f"{run}: no schedule yet")
    return 0


def set_schedule(config: Config, run: str, document: dict[str, Any], *, at: int | None, note: str, accept: bool) -> int:
    """`megapd schedule set RUN --schedule.policy=...`: replace the newest version; the run's ranks take it up together.

    at: student step that it begins at at the earliest; None: as soon as it can be.
    """
    with _runs(config.scheduler) as known:
        found = known.find(run)
        made = known.set_schedule(run, document, expected=found["schedule_version"], effective=at, note=note, accept=accept)
    print(_version_line(made, found["steps"]))
    return 0


def _version_line(version: dict[str, Any], steps: int) -> str:
    if version["applied"] is None:
        applied = "not taken up yet"
    elif version["applied"] >= steps:
        applied = "never taken up: the run ended before, or could not follow it"
    else:
        applied = f"taken up at student step {version['applied']}"
    policy, note = version["document"]["policy"], f" ({version['note']})" if version["note"] else ""
    begins = f"version {version['version']}: {policy}, begins at student step {version['effective']}"
    return f"{begins}, {applied}, by {version['author']}{note}"


class _Runs(Protocol):
    """What the verbs of schedules need, of the service or of the store itself."""

    def find(self, run: str) -> dict[str, Any]: ...

    def schedules(self, run: str) -> list[dict[str, Any]]: ...

    def decisions(self, run: str) -> Sequence[Any]: ...

    def set_schedule(self, run: str, document: dict[str, Any], **change: Any) -> dict[str, Any]: ...


class _LocalRuns:
    def __init__(self, store: Store) -> None:
        self._store = store

    def find(self, run: str) -> dict[str, Any]:
        return self._told(lambda: self._store.read(lambda connection: runs.find_run(connection, run)))

    def schedules(self, run: str) -> list[dict[str, Any]]:
        return self._told(lambda: self._store.read(lambda connection: runs.list_schedules(connection, run)))

    def decisions(self, run: str) -> Sequence[Any]:
        return self._told(lambda: self._store.read(lambda connection: runs.list_decisions(connection, run)))

    def set_schedule(self, run: str, document: dict[str, Any], **change: Any) -> dict[str, Any]:
        author = "command line"
        return self._told(lambda: self._store.write(lambda c: runs.set_schedule(c, run, document, author=author, **change)[0]))

    @staticmethod
    def _told(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except StoreError as error:
            raise UserError(str(error)) from error


class _RemoteRuns:
    def __init__(self, api: Api) -> None:
        self._api = api

    def find(self, run: str) -> dict[str, Any]:
        return told(lambda: self._api.ask("GET", _path(run)))

    def schedules(self, run: str) -> list[dict[str, Any]]:
        return self._pages(f"{_path(run)}/schedules", "version", 0)

    def decisions(self, run: str) -> Sequence[Any]:
        return self._pages(f"{_path(run)}/decisions", "sequence", -1)

    def set_schedule(self, run: str, document: dict[str, Any], **change: Any) -> dict[str, Any]:
        return told(lambda: self._api.ask("PUT", f"{_path(run)}/schedule", {"document": document, **change}))

    def _pages(self, path: str, key: str, after: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            last = found[-1][key] if found else after
            page = told(lambda: self._api.ask("GET", f"{path}?after={last}&limit={PAGE}"))  # noqa: B023 - called at once
            found += page
            if len(page) < PAGE:
                return found


def _path(run: str) -> str:
    return f"/v1/runs/{quote(run, safe='')}"


@contextlib.contextmanager
def _runs(settings: Scheduler) -> Iterator[_Runs]:
    if settings.url is not None:
        with contextlib.closing(Api(settings, retry_seconds=RETRY_SECONDS)) as api:
            yield _RemoteRuns(api)
    else:
        with contextlib.closing(_existing(settings)) as store:
            yield _LocalRuns(store)


def _existing(settings: Scheduler) -> Store:
    """The store. UserError where it would be made for a command that only reads, or changes, what is there."""
    path = make_url(settings.database).database
    if settings.database.startswith("sqlite") and not (path and Path(path).exists()):
        raise UserError(
            f"scheduler.database: there is no {path}; name the service with scheduler.url, or the database's own file"
        )
    return Store(settings.database)


# ---------------------------------------------------------------------------------------------------------- trajectories


def import_checkpoints(
    config: Config, source: str, *, name: str | None = None, probe_samples: int = 0, watch: bool = False
) -> int:
    """`megapd trajectory import FOLDER|hf:REPO [--as NAME] [--probe SAMPLES] [--watch]`.

    Into the service at scheduler.url, else into scheduler.database. probe_samples: held-out samples of the configuration's task
    on which each checkpoint's loss is measured, 0: none. watch: go on until SIGTERM or SIGINT with what a teacher writes.
    """
    from megapd.schedule.registry import import_trajectory, watch_trajectory

    probe = None
    if probe_samples:
        from megapd.schedule.probe import TaskProbe

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
    from megapd.schedule.registry import verify_trajectory

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
def _registry(settings: Scheduler, *, existing: bool = False) -> Iterator[Registry]:
    from megapd.schedule.registry import LocalRegistry, RemoteRegistry

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
