"""Carried out of megapd/schedule/command.py."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import yaml

from megapd.commands.scheduler import PAGE, RETRY_SECONDS, _existing
from megapd.config import Config, SchedulerConfig
from megapd.errors import UserError
from megapd.scheduler.client.http import Api, told
from megapd.scheduler.store import runs
from megapd.scheduler.store.database import Store, StoreError

if TYPE_CHECKING:
    pass


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
def _runs(settings: SchedulerConfig) -> Iterator[_Runs]:
    if settings.url is not None:
        with contextlib.closing(Api(settings, retry_seconds=RETRY_SECONDS)) as api:
            yield _RemoteRuns(api)
    else:
        with contextlib.closing(_existing(settings)) as store:
            yield _LocalRuns(store)
