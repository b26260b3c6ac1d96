"""`megapd scheduler`: the service itself, and the tokens of its database."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from megapd.commands.progress import Progress
from megapd.config import Config
from megapd.errors import UserError
from megapd.files import write_private
from megapd.interrupts import until_signalled
from megapd.network import server_address
from megapd.scheduler.local import existing_store
from megapd.scheduler.server import serve
from megapd.scheduler.store import ROLES, Store, Unavailable, runs, tokens, trajectories


def serve_scheduler(config: Config) -> int:
    """`megapd scheduler CONFIG`: answer until SIGTERM or SIGINT."""
    settings = config.scheduler
    scheme = "http" if settings.certificate is None else "https"

    progress = Progress("scheduler")

    def ready(port: int) -> None:
        print(f"megapd: scheduler on {server_address(scheme, settings.host, port)}", file=sys.stderr, flush=True)
        progress.say(f"store {settings.database}, leases of {settings.lease_seconds:g} s")

    with until_signalled() as stop:
        serve(settings, stop, ready=ready)
    with _opened(existing_store(settings)) as store:
        progress.close(f"ended; its store has {_counts(store)}")
    return 0


def _counts(store: Store) -> str:
    many = 1 << 30
    found = store.read(lambda c: (len(runs.list_runs(c, "", many)), len(trajectories.list_trajectories(c, "", many))))
    return f"{found[0]:,} runs and {found[1]:,} trajectories"


def create_token(config: Config, role: str, name: str | None, output: Path | None) -> int:
    """`megapd scheduler token ROLE`: print a new token, of which a hash is kept. The database's owner alone can do this.

    output: a new file for it instead, which its owner alone can read.
    """
    if role not in ROLES:
        raise UserError(f"role: {role!r} is none; there are {', '.join(ROLES)}")
    with _opened(Store(config.scheduler.database.reveal("scheduler.database"))) as store:
        name = name or _free(store, role)
        if output is not None and (output.exists() or not output.parent.is_dir()):
            raise UserError(f"--output: {output} is there already, or its folder is not; name a new file in a folder that exists")
        token = store.write(lambda connection: tokens.create_token(connection, role, name))
        if output is None:
            print(token)
            return 0
        try:
            write_private(output, token + "\n")
        except BaseException:
            store.write(lambda connection: tokens.revoke_token(connection, name))  # nobody has it
            raise
    return 0


def revoke_token(config: Config, name: str) -> int:
    """`megapd scheduler revoke NAME`."""
    with _opened(existing_store(config.scheduler)) as store:
        store.write(lambda connection: tokens.revoke_token(connection, name))
    return 0


def list_tokens(config: Config) -> int:
    """`megapd scheduler tokens`: names and roles."""
    with _opened(existing_store(config.scheduler)) as store:
        for token in store.read(tokens.list_tokens):
            print(f"{token['name']}  {token['role']}")
    return 0


@contextlib.contextmanager
def _opened(store: Store) -> Iterator[Store]:
    """Closed at the end. UserError where the database does not take what is written."""
    with contextlib.closing(store):
        try:
            yield store
        except Unavailable as error:
            raise UserError(f"scheduler.database: {error}") from error


def _free(store: Store, role: str) -> str:
    taken = {token["name"] for token in store.read(tokens.list_tokens)}
    numbered = [role, *(f"{role}-{number}" for number in range(2, len(taken) + 3))]
    return next(name for name in numbered if name not in taken)
