"""Pause, advance, pin and resume a run's schedule: each is a new version of it, and all that history and replay know."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import Connection

from megapd.schedule.policies import candidates
from megapd.scheduler.store import trajectories as catalogue
from megapd.scheduler.store.database import Refused
from megapd.scheduler.store.runs import begins, find_run, list_decisions, list_schedules, parse_schedule, resolve, set_schedule

Action = Literal["pause", "advance", "pin", "resume"]
NOTE = "control: "  # how the versions that are made here begin their notes


def control(
    connection: Connection,
    run: str,
    action: Action,
    *,
    expected: int,
    effective: int,
    author: str,
    checkpoint: int | None = None,
    accept: bool = False,
) -> tuple[dict[str, Any], bool]:
    """(the new schedule version, whether it is new); it begins at student step `effective`, as `set_schedule` has it.

    pause    the checkpoint that teaches the step before goes on teaching
    advance  the next rotation takes place then; those after it stay where they were
    pin      the checkpoint of the teacher's step `checkpoint` teaches
    resume   the newest version that was no such action is in force again, with the place that it has at that step

    Raises Refused where there is nothing to act on.
    """
    found, versions = find_run(connection, run), list_schedules(connection, run)
    if not versions:
        raise Refused(f"run: {run} has no schedule yet, set one first")
    if action == "pin":
        if checkpoint is None:
            raise Refused("checkpoint: pin needs the teacher's step")
        document: dict[str, Any] = {"policy": "one_shot", "checkpoint": checkpoint}
    elif action == "resume":
        document = next(version["document"] for version in reversed(versions) if not version["note"].startswith(NOTE))
    else:
        before = [version for version in versions if version["version"] <= expected]
        teaching, coming = _around(connection, found, before or versions, effective)
        if action == "pause":
            document = {"policy": "one_shot", "checkpoint": teaching}
        elif not coming:
            raise Refused(f"run: no rotation of {run} is to come after student step {effective - 1}")
        else:
            later = [(0, coming[0][1]), *((start, teacher) for start, teacher in coming[1:] if start > effective)]
            document = {"policy": "explicit", "ranges": [{"start": start, "checkpoint": teacher} for start, teacher in later]}
    note = f"{NOTE}{action}"
    return set_schedule(
        connection, run, document, expected=expected, effective=effective, author=author, note=note, accept=accept
    )


def _around(
    connection: Connection, run: dict[str, Any], versions: list[dict[str, Any]], effective: int
) -> tuple[int, list[tuple[int, int]]]:
    """(teacher step of student step effective - 1, the rotations from `effective` on) by the versions that there are."""
    step = max(effective - 1, 0)
    if step >= run["steps"]:
        raise Refused(f"effective: {run['name']} ends at step {run['steps']}; choose an earlier one")
    begun = [version for version in versions if begins(version) <= step]
    schedule = parse_schedule(begun[-1]["document"])
    plan = resolve(connection, run, schedule)
    if schedule.grows is None:
        return plan.checkpoint_at(step), [rotation for rotation in plan.rotations() if rotation[0] > step]
    taken = [(begins(decision), decision["checkpoint"]) for decision in list_decisions(connection, run["name"])]
    teaching = next((teacher for start, teacher in reversed(taken) if start <= step), plan.checkpoint_at(0))
    coming = [decision for decision in taken if decision[0] > step]
    if not coming:
        available = catalogue.steps_of(connection, run["trajectory"])
        following = [teacher for teacher in candidates(schedule.grows, available) if teacher > teaching]
        coming = [(effective, following[0])] if following else []
    return teaching, coming
