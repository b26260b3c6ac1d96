"""The scheduler's store: a database, brought to the present version, that many read and one thread writes.

    store = Store("sqlite:///scheduler.db")
    store.write(lambda connection: runs.create(connection, ...))    returns once the transaction is on the disk
    store.read(lambda connection: runs.find(connection, ...))

Writes are functions of a connection that say what is to hold together. They queue for one thread, which puts those that wait into
one transaction, each behind a savepoint: one flush to the disk serves all of them, and what is wrong with one leaves the others
alone. A write has happened when its future says so, not before.

SQLite: WAL with synchronous=FULL, so an acknowledged write outlives a power cut, and readers never wait. PostgreSQL: psycopg 3,
writers one after the other behind an advisory lock, so that event ids become visible in their order, as they do with SQLite.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from sqlalchemy import Connection, Engine, Row, Select, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from megapd.errors import UserError, masked
from megapd.files import disk_failure
from megapd.scheduler.store.tables import metadata

log = logging.getLogger(__name__)
HEAD = "0001"  # the newest migration; a store at it starts without alembic, which takes as long to import as all of this
BUSY_SECONDS = 30.0  # wait for another process that writes
BATCH = 256  # writes in one transaction at most
WRITE_LOCK, SERVICE_LOCK = 0x6D65_6761, 0x6D65_6762  # PostgreSQL's advisory locks
T = TypeVar("T")
_Work: TypeAlias = tuple[Callable[[Connection], Any], Future[Any]]


class NotFound(UserError):
    """There is no such thing. This, Conflict and Refused leave the store as it was."""


class Conflict(UserError):
    """Something else is there. `current`: what, as a tree, where that helps to go on."""

    def __init__(self, message: str, current: Any = None) -> None:
        super().__init__(message)
        self.current = current


class Refused(UserError):
    """What was asked for cannot be: the message names the field and the fix."""


class Unavailable(Exception):
    """The database did not answer or could not write; the write did not happen, or is not known to have."""


class Store:
    """Open until `close`. `write` and `submit` are for any thread; `read` runs in the caller's."""

    def __init__(self, url: str) -> None:
        """Makes or migrates the tables. Raises UserError where the database cannot be opened or is of a newer megapd."""
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError):  # their messages repeat parts of the address, of its password too
            fix = "give sqlite:///FILE or postgresql://USER@HOST:PORT/NAME"
            raise UserError(f"scheduler.database: {masked(url)} is no database's address; {fix}") from None
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        self.sqlite = parsed.get_backend_name() == "sqlite"
        self.path = Path(parsed.database) if self.sqlite and parsed.database else None
        self._shown = parsed.render_as_string(hide_password=True)
        self._engines: list[Engine] = []
        try:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._engines += [_engine(parsed, writes=True), _engine(parsed, writes=False)]
            self._writer_engine, self._reader_engine = self._engines
            _migrate(self._writer_engine, self._shown)
        except (SQLAlchemyError, OSError, UserError) as error:
            self._dispose()
            if isinstance(error, UserError):
                raise
            what = f"{self._shown} cannot be opened: {_one_line(getattr(error, 'orig', error))}; correct the URL or its rights"
            raise UserError(f"scheduler.database: {self._disk(error) or what}") from error
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._closed = False
        self._locked = contextlib.ExitStack()
        self._listeners: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._work, name="schedule-store", daemon=True)
        self._thread.start()

    def read(self, do: Callable[[Connection], T]) -> T:
        """What `do` returns, of committed states of the store. `do` is one statement, or takes what may change between two."""
        try:
            with self._reader_engine.connect() as connection:
                return do(connection)
        except DBAPIError as error:
            raise self._unavailable(error) from error

    def write(self, do: Callable[[Connection], T]) -> T:
        """What `do` returned, once its transaction is on the disk. Raises what `do` raised; nothing of it is kept then."""
        return self.submit(do).result()

    def submit(self, do: Callable[[Connection], T]) -> Future[T]:
        """As `write`, without waiting. `do` runs on the store's thread, and again never."""
        future: Future[T] = Future()
        if self._closed:
            raise Unavailable("the store is closed")
        self._queue.put((do, future))
        return future

    def on_commit(self, tell: Callable[[], None]) -> None:
        """Call `tell` on the store's thread after every transaction."""
        self._listeners.append(tell)

    def lock_service(self) -> None:
        """Be the one service of this store until `close`: two would each drop the replicas whose heartbeats go to the other.

        UserError if there is one.
        """
        problem = f"scheduler.database: another scheduler serves {self._shown}; stop it, or give this one a store of its own"
        if self.path is not None:
            descriptor = os.open(f"{self.path}.service", os.O_RDWR | os.O_CREAT, 0o600)
            self._locked.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(problem) from error
        elif not self.sqlite:
            connection = self._locked.enter_context(self._reader_engine.connect())
            if not connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": SERVICE_LOCK}).scalar():
                raise UserError(problem)

    def close(self) -> None:
        """After the writes that wait."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join()
        self._locked.close()
        self._dispose()

    def _dispose(self) -> None:
        for engine in self._engines:
            engine.dispose()

    def _work(self) -> None:
        waiting: list[_Work | None] = []
        while None not in waiting:
            waiting = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(waiting) < BATCH:
                    waiting.append(self._queue.get_nowait())
            batch = [item for item in waiting if item is not None and item[1].set_running_or_notify_cancel()]
            if batch:
                self._commit(batch)

    def _commit(self, batch: list[_Work]) -> None:
        try:
            with self._writer_engine.begin() as connection:
                outcomes = [self._attempt(connection, do) for do, _ in batch]
        except Exception as error:
            if isinstance(error, DBAPIError):
                error = self._unavailable(error)
                log.error("scheduler.database: %s: %s", self._shown, error)
            outcomes = [(False, error)] * len(batch)
        for (_, future), (good, outcome) in zip(batch, outcomes, strict=True):
            if good:
                future.set_result(outcome)
            else:
                future.set_exception(outcome)
        for tell in self._listeners:
            tell()

    def _attempt(self, connection: Connection, do: Callable[[Connection], Any]) -> tuple[bool, Any]:
        """(True, what it returned) or (False, what it raised), undone; what cannot be undone alone ends the transaction."""
        savepoint = connection.begin_nested()
        try:
            result = do(connection)
        except Exception as error:
            savepoint.rollback()
            return False, self._unavailable(error) if isinstance(error, DBAPIError) else error
        savepoint.commit()
        return True, result

    def _unavailable(self, error: DBAPIError) -> Unavailable:
        return Unavailable(self._disk(error) or _one_line(error.orig))

    def _disk(self, error: Exception) -> str | None:
        """One line on the disk that is to blame for an error of SQLite."""
        return None if self.path is None else disk_failure(error, self.path)


def one(connection: Connection, query: Select[Any], missing: str) -> Row[Any]:
    """The first row; NotFound, which says `missing`, without one."""
    row = connection.execute(query).first()
    if row is None:
        raise NotFound(missing)
    return row


def _one_line(what: object) -> str:
    return " ".join(str(what).split())


def _engine(url: Any, *, writes: bool) -> Engine:
    if url.get_backend_name() != "sqlite":
        # A service must notice a database that is gone, and not hang on it: the kernel alone would wait a quarter of an hour.
        patience = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
        engine = create_engine(url, pool_pre_ping=writes, connect_args=patience, pool_size=4, max_overflow=12)
        if not writes:
            return engine.execution_options(isolation_level="AUTOCOMMIT")
        lock = f"SELECT pg_advisory_xact_lock({WRITE_LOCK})"
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(lock))
        return engine
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}, pool_size=4, max_overflow=28)

    def connected(connection: Any, _: Any) -> None:
        # Python's sqlite3 would begin transactions where it sees fit; here BEGIN says when.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    event.listen(engine, "connect", connected)
    if writes:
        # A transaction that turns into a writing one later fails, and does not wait, where another one has written meanwhile.
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def _migrate(engine: Engine, shown: str) -> None:
    with engine.begin() as connection:
        known = inspect(connection).has_table("alembic_version")
        version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar() if known else None
        if version == HEAD:
            return
        from alembic import command
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", "megapd.scheduler.store:migrations")
        config.set_main_option("path_separator", "os")
        if version is None:
            metadata.create_all(connection, checkfirst=False)
            command.stamp(config, HEAD)
        elif any(older.revision == version for older in ScriptDirectory.from_config(config).walk_revisions()):
            command.upgrade(config, HEAD)
        else:
            told = f"{shown} is of a newer megapd (version {version}); update megapd, or use its own"
            raise UserError(f"scheduler.database: {told}")
