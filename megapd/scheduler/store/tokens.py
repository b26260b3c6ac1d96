"""Bearer tokens in the store: functions of a connection, for Store.read and Store.write."""

from __future__ import annotations

import hashlib
import secrets
import time
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select

from megapd.scheduler.store.database import Conflict, NotFound
from megapd.scheduler.store.events import emit
from megapd.scheduler.store.tables import tokens

ROLES = ("read", "run", "admin")  # each may do what those before it may
_TOKEN = select(tokens.c.name, tokens.c.role).where(tokens.c.hash == bindparam("token"))
PREFIX = "megapd_"  # so that a token that leaked into a log or a repository is recognised


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
