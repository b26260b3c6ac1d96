"""`megapd scheduler`, `megapd schedule` and `megapd trajectory import|verify`: functions that print and return the exit code."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import make_url

from megapd.config import Config, SchedulerConfig
from megapd.errors import UserError
from megapd.scheduler.store import tokens as journal
from megapd.scheduler.store.database import Conflict, NotFound, Store

if TYPE_CHECKING:
    pass


RETRY_SECONDS = 10.0  # a command waits this long for a service that is away


PAGE = 1000


def serve_scheduler(config: Config) -> int:
    """`megapd scheduler CONFIG`: answer until SIGTERM or SIGINT."""
    from megapd.scheduler.server import serve

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


def _existing(settings: SchedulerConfig) -> Store:
    """The store. UserError where it would be made for a command that only reads, or changes, what is there."""
    path = make_url(settings.database).database
    if settings.database.startswith("sqlite") and not (path and Path(path).exists()):
        raise UserError(
            f"scheduler.database: there is no {path}; name the service with scheduler.url, or the database's own file"
        )
    return Store(settings.database)
