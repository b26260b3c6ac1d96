"""`megapd schedule`: the schedules of the scheduler's runs, at scheduler.url or in scheduler.database."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import yaml

from megapd.config import Config
from megapd.scheduler.local import open_api
from megapd.scheduler.store.runs import begins


def show_schedule(config: Config, run: str) -> int:
    """`megapd schedule show RUN`: the newest version, where the run is, and who teaches it."""
    with open_api(config.scheduler) as api:
        found = api.ask("GET", _path(run))
        newest = api.ask("GET", f"{_path(run)}/schedule") if found["schedule_version"] else None
    done = "nothing reported yet" if found["step"] < 0 else f"{found['step']} of {found['steps']} steps done"
    print(f"{run}: {done}, {found['decisions']} decisions, replicas: {', '.join(found['endpoints']) or 'none'}")
    if newest is None:
        print("no schedule yet")
        return 0
    print(_version_line(newest, found["steps"]))
    print(yaml.safe_dump(newest["document"], sort_keys=False).rstrip())
    return 0


def schedule_history(config: Config, run: str) -> int:
    """`megapd schedule history RUN`: all versions, and all decisions with what they rest on."""
    with open_api(config.scheduler) as api:
        found = api.ask("GET", _path(run))
        versions = api.pages(f"{_path(run)}/schedules", "version", 0)
        decisions = api.pages(f"{_path(run)}/decisions", "sequence", -1)
    for version in versions:
        print(_version_line(version, found["steps"]))
    for decision in decisions:
        begin = begins(decision)
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
    change = {"document": document, "effective": at, "note": note, "accept": accept}
    with open_api(config.scheduler) as api:
        found = api.ask("GET", _path(run))
        made = api.ask("PUT", f"{_path(run)}/schedule", {**change, "expected": found["schedule_version"]})
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


def _path(run: str) -> str:
    return f"/v1/runs/{quote(run, safe='')}"
