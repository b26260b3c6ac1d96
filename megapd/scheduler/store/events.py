"""Events of the store: functions of a connection, for Store.read and Store.write."""

from __future__ import annotations

import json
import time
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select

from megapd.scheduler.store.tables import canonical, events


def emit(connection: Connection, kind: str, run: str | None = None, **body: Any) -> None:
    """An event of what the same transaction did; it gets the next id."""
    connection.execute(insert(events), {"kind": kind, "run": run, "body": canonical(body), "created": time.time()})


def events_after(connection: Connection, after: int, limit: int, run: str | None = None) -> list[dict[str, Any]]:
    """The first `limit` events with a greater id, in order; of one run, or all."""
    query = select(events).where(events.c.id > after).order_by(events.c.id).limit(limit)
    if run is not None:
        query = query.where(events.c.run == run)
    return [{**row, "body": json.loads(row["body"])} for row in connection.execute(query).mappings()]


def span(connection: Connection) -> tuple[int, int]:
    """(id of the oldest event kept, of the newest), (0, 0) of none."""
    oldest, newest = connection.execute(select(func.min(events.c.id), func.max(events.c.id))).one()
    return oldest or 0, newest or 0


def prune(connection: Connection, before: float) -> int:
    """Remove the events older than that time; how many."""
    return connection.execute(delete(events).where(events.c.created < before)).rowcount
