"""Events and bearer tokens of the store: functions of a connection, for Store.read and Store.write."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, select

from megapd.schedule.store import Conflict, NotFound
from megapd.schedule.tables import canonical, events, tokens

ROLES = ("read", "run", "admin")  # each may do what those before it may
_TOKEN = select(tokens.c.name, tokens.c.role).where(tokens.c.hash == bindparam("token"))
PREFIX = "megapd_"  # so that a token that leaked into a log or a repository is recognised


def emit(connection: Connection, kind: str, run: str | None = None, **body: Any) -> None:
    """An event of what the same transaction did; it gets the next id."""
    connection.execute(insert(events), {"kind": kind, "run": run, "body": canonical(body), "created": time.time()})


def events_after(connection: Connection, after: int, limit: int, run: str | None = None) -> list[dict[str, Any]]:
    """The first `limit` events with a greater id, in order; of one run, or all."""
    query = select(events).where(events.c.id > after).order_by(events.c.id).limit(limit)
    if run is not None:
        query = query.where(events.c.run == run)
    return [
        {"id": row.id, "kind": row.kind, "run": row.run, "body": json.loads(row.body), "created": row.created}
        for row in connection.execute(query)
    ]


def span(connection: Connection) -> tuple[int, int]:
    """(id of the oldest event kept, of the newest), (0, 0) of none."""
    oldest, newest = connection.execute(select(func.min(events.c.id), func.max(events.c.id))).one()
    return oldest or 0, newest or 0


def prune(connection: Connection, before: float) -> int:
    """Remove the events older than that time; how many."""
    return connection.execute(delete(events).where(events.c.created < before)).rowcount


# ---------------------------------------------------------------------------------------------------------------- tokens


def token_hash(token: str) -> str:
    """What is kept of a bearer token: its sha256, hexadecimal.

    Tokens are 256 random bits that nobody chooses, so a slow hash (scrypt) would make nothing harder to guess: there is no list
    of likely ones, and 2**256 are out of reach however fast each is tried. A slow one would cost every request its 50 ms instead.
    """
    return hashlib.sha256(token.encode()).hexdigest()


def create_token(connection: Connection, role: str, name: str) -> str:
    """A new token, which is kept nowhere. Conflict if one of that name exists."""
    assert role in ROLES
    if connection.execute(select(tokens.c.name).where(tokens.c.name == name)).first():
        raise Conflict(f"name: there is a token called {name}; choose another, or revoke that one")
    token = PREFIX + secrets.token_urlsafe(32)
    row = {"hash": token_hash(token), "name": name, "role": role, "created": time.time()}
    connection.execute(insert(tokens), row)
    emit(connection, "token_created", name=name, role=role)
    return token


def revoke_token(connection: Connection, name: str) -> None:
    if not connection.execute(delete(tokens).where(tokens.c.name == name)).rowcount:
        raise NotFound(f"name: there is no token called {name}")
    emit(connection, "token_revoked", name=name)


def find_token(connection: Connection, hashed: str) -> tuple[str, str] | None:
    """(name, role)."""
    row = connection.execute(_TOKEN, {"token": hashed}).first()
    return None if row is None else (row.name, row.role)


def list_tokens(connection: Connection) -> list[dict[str, Any]]:
    query = select(tokens.c.name, tokens.c.role, tokens.c.created).order_by(tokens.c.name)
    return [dict(row._mapping) for row in connection.execute(query)]
