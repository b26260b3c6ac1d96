"""A run's place at the service: what it registers as, and whether both know the same of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from pydantic import ValidationError

from megapd.config import ScheduleConfig
from megapd.errors import UserError
from megapd.schedule.plan import Change, Plan, Version
from megapd.scheduler.client import answers
from megapd.scheduler.client.answers import DecisionAnswer, VersionAnswer
from megapd.scheduler.client.http import Api, Refusal

Resolve = Callable[[ScheduleConfig], Plan]  # a schedule over the run's own trajectory
Weights = Callable[[int], str | None]  # teacher step -> digest of its weights in the run's own folder, None: not known (yet)


@dataclass(frozen=True)
class Registration:
    """What the service is told of a run. schedule: None where nothing teaches. group: whose replicas do."""

    name: str
    steps: int
    trajectory: str | None
    group: str | None
    facts: Mapping[str, Any]
    schedule: ScheduleConfig | None

    @property
    def path(self) -> str:
        return f"/v1/runs/{quote(self.name, safe='')}"


def register(api: Api, run: Registration) -> None:
    """The run with its own configuration as the first version. Refusal if the service has another for a run of that name."""
    body = {"trajectory": run.trajectory, "group": run.group, "steps": run.steps, "facts": dict(run.facts)}
    newest = answers.ask(api, answers.RUN, "PUT", run.path, body).schedule_version
    if run.schedule is None:
        return
    if newest == 0:
        document = run.schedule.model_dump(mode="json")
        body = {"expected": 0, "effective": 0, "document": document, "note": "the run's configuration"}
        answers.ask(api, answers.ANYTHING, "PUT", f"{run.path}/schedule", body)
        return
    first = answers.ask(api, answers.VERSION, "GET", f"{run.path}/schedule?version=1").document
    try:
        same = answers.SCHEDULE.validate_python(first) == run.schedule
    except ValidationError:  # of a newer megapd
        same = False
    if not same:
        raise Refusal(
            f"schedule: the scheduler knows {run.name} with another first schedule, {json.dumps(first)}; "
            f"choose another name, or restore it and change it with `megapd schedule set`",
            409,
            first,
        )


def untold_beginnings(api: Api, run: Registration, changes: Sequence[Change]) -> dict[str, int]:
    """Of the changes on record, the path and the begin of those whose begin a crash may have kept from the service.

    Refusal if it has lost one, or has another: what it would decide from there on would rest on another run's history. `changes`
    are read before the service is asked, so that it knew each by then.
    """
    if not changes:
        return {}
    versions = {told.version: told for told in answers.pages(api, answers.VERSIONS, f"{run.path}/schedules", "version", 1)}
    made = {told.sequence: told for told in answers.pages(api, answers.DECISIONS, f"{run.path}/decisions", "sequence", -1)}
    untold = {}
    for change in changes:
        told: VersionAnswer | DecisionAnswer | None
        if isinstance(change, Version):
            told = version = versions.get(change.version)
            same = version is not None and version.document.get("policy") == change.policy
        else:
            told = decision = made.get(change.sequence)
            same = decision is not None and (decision.step, decision.checkpoint) == (change.step, change.checkpoint)
        if told is None or not same or told.effective > change.begin or told.applied not in (None, change.begin):
            raise Refusal(
                f"schedule: in the run's folder, {change} of {run.name} is on record from student step {change.begin} on, "
                f"but the scheduler has {'none' if told is None else 'another'}; restore scheduler.database, or choose "
                f"another name",
                409,
                None,
            )
        # A decision that begins where it was made to needs no word.
        if told.applied is None and (change.begin != told.effective or isinstance(change, Version)):
            untold[told.path] = change.begin
    return untold


def registered_weights(api: Api, run: Registration, teachers: Iterable[int], weights: Weights) -> dict[int, str]:
    """Teacher step -> digest of its weights, of the trajectory that the run names, if any. UserError where one of the plan's
    `teachers` has other weights in the run's own folder."""
    if run.trajectory is None:
        return {}
    path = f"/v1/trajectories/{quote(run.trajectory, safe='')}/checkpoints"
    registered = {record.step: record.weights for record in answers.pages(api, answers.CHECKPOINTS, path, "step", -1)}
    for step in teachers:
        found = weights(step) if step in registered else None
        if found is not None and found != registered[step]:
            raise UserError(
                f"teacher.trajectory: the checkpoint of step {step} has digest {found}, but {registered[step]} is "
                f"registered as scheduler.trajectory {run.trajectory}; name the trajectory that is registered, or "
                f"import this one"
            )
    return registered
