"""Trajectories, checkpoints, their flags and movable names in the store: functions of a connection.

A trajectory is addressed by the sha256 of {run, location, vocabulary}, a checkpoint by that of its whole record, both as
canonical JSON. Neither is ever changed; a trajectory grows. A name points to one of them and can be moved. What `verify` found
stands beside, as flags.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from megapd.scheduler.store.database import Conflict, NotFound, Refused, one
from megapd.scheduler.store.events import emit
from megapd.scheduler.store.tables import DIGEST, NAME, canonical, checkpoints, digest_of, flags, names, trajectories

# ---------------------------------------------------------------------------------------------------------- trajectories


def add_trajectory(
    connection: Connection, run: str, location: str, vocabulary: str, name: str | None = None
) -> tuple[dict[str, Any], bool]:
    """(the trajectory, whether it is new): a repeat changes nothing. name: also points to it."""
    record = {"run": run, "location": location, "vocabulary": vocabulary}
    digest = digest_of(record)
    found = connection.execute(select(trajectories).where(trajectories.c.digest == digest)).first()
    row = {"digest": digest, **record, "created": time.time()} if found is None else dict(found._mapping)
    if found is None:
        connection.execute(insert(trajectories), row)
        emit(connection, "trajectory", trajectory=digest, of=run, location=location)
    if name is not None:
        set_name(connection, name, digest)
    return row, found is None


def find_trajectory(connection: Connection, reference: str) -> dict[str, Any]:
    """Of a digest or a name."""
    query = select(trajectories).where(trajectories.c.digest == resolve(connection, reference))
    return dict(one(connection, query, f"trajectory: there is none called {reference}")._mapping)


def list_trajectories(connection: Connection, after: str, limit: int) -> list[dict[str, Any]]:
    """In the order of their digests, those after one."""
    query = select(trajectories).where(trajectories.c.digest > after).order_by(trajectories.c.digest).limit(limit)
    return [dict(row._mapping) for row in connection.execute(query)]


# ----------------------------------------------------------------------------------------------------------- checkpoints


def add_checkpoint(connection: Connection, trajectory: str, record: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """(the checkpoint, whether it is new) of a record with at least step and weights; trajectory: digest or name.

    A repeat of the same record changes nothing; another one for the same step is a Conflict, since records are immutable.
    """
    trajectory = find_trajectory(connection, trajectory)["digest"]
    digest = digest_of({"trajectory": trajectory, **record})
    place = (checkpoints.c.trajectory == trajectory) & (checkpoints.c.step == record["step"])
    found = connection.execute(select(checkpoints).where(place)).first()
    if found is not None:
        if found.digest != digest:
            raise Conflict(
                f"step: the trajectory has another checkpoint of step {record['step']}, {found.digest[:12]}, and records are "
                f"immutable; verify it, or register what is there now as a trajectory of its own",
                {"digest": found.digest},
            )
        return _checkpoint(connection, found), False
    given = {"digest": digest, "trajectory": trajectory, "step": record["step"], "weights": record["weights"]}
    row = {**given, "record": canonical(record), "created": time.time()}
    connection.execute(insert(checkpoints), row)
    emit(connection, "checkpoint", trajectory=trajectory, checkpoint=digest, step=record["step"])
    return {**_flat(row), "flags": []}, True


def find_checkpoint(connection: Connection, reference: str) -> dict[str, Any]:
    query = select(checkpoints).where(checkpoints.c.digest == resolve(connection, reference))
    return _checkpoint(connection, one(connection, query, f"checkpoint: there is none called {reference}"))


def checkpoint_at(connection: Connection, trajectory: str, step: int) -> dict[str, Any]:
    query = select(checkpoints).where((checkpoints.c.trajectory == trajectory) & (checkpoints.c.step == step))
    return _checkpoint(connection, one(connection, query, f"step: the trajectory has no checkpoint of step {step}"))


def list_checkpoints(connection: Connection, trajectory: str, after: int = -1, limit: int = 1 << 30) -> list[dict[str, Any]]:
    """Those of steps after `after`, in order; trajectory: digest or name."""
    digest = find_trajectory(connection, trajectory)["digest"]
    query = select(checkpoints).where((checkpoints.c.trajectory == digest) & (checkpoints.c.step > after))
    query = query.order_by(checkpoints.c.step).limit(limit)
    flagged = _flags(connection, flags.c.checkpoint.in_(query.with_only_columns(checkpoints.c.digest)))
    rows = connection.execute(query).mappings()
    return [{**_flat(row), "flags": flagged.get(row["digest"], [])} for row in rows]


def steps_of(connection: Connection, trajectory: str) -> list[int]:
    query = select(checkpoints.c.step).where(checkpoints.c.trajectory == trajectory).order_by(checkpoints.c.step)
    return list(connection.execute(query).scalars())


def flagged_steps(connection: Connection, trajectory: str) -> dict[int, list[str]]:
    """Teacher step -> kinds, of the flags that nobody accepted."""
    query = (
        select(checkpoints.c.step, flags.c.kind)
        .join_from(checkpoints, flags, flags.c.checkpoint == checkpoints.c.digest)
        .where((checkpoints.c.trajectory == trajectory) & flags.c.accepted_by.is_(None))
    )
    found: dict[int, list[str]] = {}
    for step, kind in connection.execute(query):
        found.setdefault(step, []).append(kind)
    return found


def refuse_flagged(connection: Connection, trajectory: str, steps: Iterable[int], setting: str) -> None:
    """Refused if one of the teacher steps is flagged and not accepted."""
    flagged = flagged_steps(connection, trajectory)
    bad = sorted(set(steps) & flagged.keys())
    if bad:
        told = "; ".join(f"step {step} ({', '.join(sorted(flagged[step]))})" for step in bad[:5])
        raise Refused(
            f"{setting}: {len(bad)} of the checkpoints it names are flagged: {told}; look at `megapd trajectory verify`, and "
            f"choose others, or accept them with --accept"
        )


# ----------------------------------------------------------------------------------------------------------------- flags


def set_flags(connection: Connection, trajectory: str, found: dict[int, dict[str, str]]) -> list[dict[str, Any]]:
    """Replace the trajectory's flags by {teacher step: {kind: detail}}; what was accepted with the same detail stays accepted.

    trajectory: digest or name. Returns the flagged checkpoints. NotFound for a step that the trajectory does not have.
    """
    trajectory = find_trajectory(connection, trajectory)["digest"]
    query = select(checkpoints.c.step, checkpoints.c.digest).where(checkpoints.c.trajectory == trajectory)
    digests = {row.step: row.digest for row in connection.execute(query)}
    missing = found.keys() - digests.keys()
    if missing:
        raise NotFound(f"step: the trajectory has no checkpoint of step {min(missing)}")
    inside = select(checkpoints.c.digest).where(checkpoints.c.trajectory == trajectory)
    accepted = {
        (row.checkpoint, row.kind, row.detail): row.accepted_by
        for row in connection.execute(select(flags).where(flags.c.checkpoint.in_(inside)))
    }
    connection.execute(delete(flags).where(flags.c.checkpoint.in_(inside)))
    moment = time.time()
    rows = [
        {
            "checkpoint": digest,
            "kind": kind,
            "detail": detail,
            "found": moment,
            "accepted_by": accepted.get((digest, kind, detail)),
        }
        for digest, kinds in ((digests[step], found[step]) for step in sorted(found))
        for kind, detail in sorted(kinds.items())
    ]
    if rows:
        connection.execute(insert(flags), rows)
    emit(connection, "verified", trajectory=trajectory, flagged=sorted(found))
    return [checkpoint for checkpoint in list_checkpoints(connection, trajectory) if checkpoint["flags"]]


def accept(connection: Connection, checkpoint: str, author: str) -> dict[str, Any]:
    """Let a flagged checkpoint be scheduled: the flags that it has now; later ones hold it back again."""
    found = find_checkpoint(connection, checkpoint)
    mine = (flags.c.checkpoint == found["digest"]) & flags.c.accepted_by.is_(None)
    if connection.execute(update(flags).where(mine).values(accepted_by=author)).rowcount:
        emit(connection, "accepted", checkpoint=found["digest"], step=found["step"], by=author)
    return find_checkpoint(connection, found["digest"])


# ----------------------------------------------------------------------------------------------------------------- names


def set_name(connection: Connection, name: str, digest: str, expected: int | None = None) -> dict[str, Any]:
    """Point a name to a trajectory or checkpoint. expected: its present version, 0 of none, else Conflict; None: any."""
    if not re.fullmatch(NAME, name) or re.fullmatch(DIGEST, name):
        raise Refused(f"name: {name!r} is none; give up to 120 letters, digits, dots, underscores, hyphens, and no digest")
    known = [connection.execute(select(t.c.digest).where(t.c.digest == digest)).first() for t in (trajectories, checkpoints)]
    if not any(known):
        raise NotFound(f"digest: there is no trajectory or checkpoint {digest}")
    row = connection.execute(select(names).where(names.c.name == name)).first()
    version = 0 if row is None else row.version
    if row is not None and row.digest == digest and expected in (None, version, version - 1):
        return dict(row._mapping)  # a repeat
    if expected is not None and expected != version:
        raise Conflict(f"expected: {name} is at version {version}, not {expected}", None if row is None else dict(row._mapping))
    if row is None:
        connection.execute(insert(names), {"name": name, "digest": digest, "version": 1})
    else:
        connection.execute(update(names).where(names.c.name == name).values(digest=digest, version=version + 1))
    emit(connection, "name", name=name, digest=digest, before=None if row is None else row.digest)
    return {"name": name, "digest": digest, "version": version + 1}


def list_names(connection: Connection, after: str, limit: int) -> list[dict[str, Any]]:
    query = select(names).where(names.c.name > after).order_by(names.c.name).limit(limit)
    return [dict(row._mapping) for row in connection.execute(query)]


def resolve(connection: Connection, reference: str) -> str:
    """The digest that a digest or name stands for; NotFound if there is no such name."""
    if re.fullmatch(DIGEST, reference):
        return reference
    digest: str | None = connection.execute(select(names.c.digest).where(names.c.name == reference)).scalar()
    if digest is None:
        raise NotFound(f"name: there is none called {reference}")
    return digest


# --------------------------------------------------------------------------------------------------------------- helpers


def _flags(connection: Connection, which: Any) -> dict[str, list[dict[str, Any]]]:
    """Those of each flagged checkpoint."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in connection.execute(select(flags).where(which).order_by(flags.c.kind)).mappings():
        flag = dict(row)
        found.setdefault(flag.pop("checkpoint"), []).append(flag)
    return found


def _checkpoint(connection: Connection, row: Row[Any]) -> dict[str, Any]:
    flagged = _flags(connection, flags.c.checkpoint == row.digest)
    return {**_flat(row._mapping), "flags": flagged.get(row.digest, [])}


def _flat(row: Mapping[Any, Any]) -> dict[str, Any]:
    """The record's fields beside its address."""
    return {**{key: row[key] for key in ("digest", "trajectory", "created")}, **json.loads(row["record"])}
