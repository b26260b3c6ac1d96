"""Services for the tests: in this process, in one of its own, and a PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from starlette.testclient import TestClient

from megapd.config import SchedulerConfig
from megapd.scheduler.app import build_app
from megapd.scheduler.server import serve
from megapd.scheduler.service import Service
from megapd.scheduler.store import Store, tokens

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def client(folder: Path, **settings) -> Iterator[TestClient]:
    """A client of a service in this process, without tokens; `.service` is it."""
    given = SchedulerConfig(database=f"sqlite:///{folder}/scheduler.db", **settings)
    with contextlib.closing(Store(given.database.get_secret_value())) as store:
        service = Service(store, given)
        with TestClient(build_app(service), base_url="http://127.0.0.1", raise_server_exceptions=False) as found:
            found.service = service
            yield found


def token(store: Store, role: str) -> dict[str, str]:
    """The header of a new token."""
    made = store.write(lambda connection: tokens.create_token(connection, role, role))
    return {"Authorization": f"Bearer {made}"}


class Served:
    """A service that answers at `url`, of the store `database`."""

    def __init__(self, url: str, database: str) -> None:
        self.url, self.database = url, database

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20.0)


@contextlib.contextmanager
def serving(settings: SchedulerConfig) -> Iterator[Served]:
    """`serve` on a thread of this process. Raises what it raised."""
    ports: list[int] = []
    ready, stop = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def run():
        try:
            serve(settings, stop, ready=lambda port: (ports.append(port), ready.set()))
        except BaseException as error:
            errors.append(error)
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(30)
        if errors:
            raise errors[0]
        scheme = "http" if settings.certificate is None else "https"
        yield Served(f"{scheme}://127.0.0.1:{ports[0]}", settings.database.get_secret_value())
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


class Process(Served):
    """`serve` in a process of its own, to be killed and started again on the same port and store."""

    def __init__(self, database: str, lease_seconds: float = 30.0) -> None:
        super().__init__("", database)
        self.lease_seconds, self.port = lease_seconds, 0
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        arguments = [sys.executable, "-m", "tests.scheduler.serve", self.database, str(self.port), str(self.lease_seconds)]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the service ended with code {self.process.wait()}"
        self.port = int(line)
        self.url = f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def stop(self) -> int:
        self.process.terminate()
        code = self.process.wait(30)
        self.process.stdout.close()
        return code

    close = stop


def postgres_binaries() -> Path | None:
    """The folder of initdb and postgres: on the path, or where Debian's package puts them."""
    found = shutil.which("initdb")
    if found and shutil.which("postgres"):
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return versions[-1].parent if versions else None


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URL of a new PostgreSQL, which ends with the block. It does not run as root; then the user nobody takes it."""
    binaries = postgres_binaries()
    assert binaries is not None
    with tempfile.TemporaryDirectory(prefix="pg-") as name:  # short: a socket's path holds 107 bytes
        folder = Path(name)
        demote = {}
        if os.geteuid() == 0:
            user = pwd.getpwnam("nobody")
            os.chown(folder, user.pw_uid, user.pw_gid)
            demote = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        data, port = folder / "data", _free_port()
        command = [binaries / "initdb", "-D", data, "-U", "megapd", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"]
        made = subprocess.run(command, capture_output=True, text=True, cwd=folder, **demote)
        assert made.returncode == 0, made.stderr
        # fsync stays on: what is acknowledged is what the test is about.
        options = ["-p", str(port), "-h", "127.0.0.1", "-k", folder, "-c", "shared_buffers=16MB", "-c", "max_connections=60"]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen([binaries / "postgres", "-D", data, *options], stdout=log, stderr=log, cwd=folder, **demote)
        try:
            _wait(port, server)
            yield f"postgresql://megapd@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGQUIT)  # "immediate": nobody will want the data
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def new_database(url: str) -> str:
    """Of a server's URL, that of a new and empty database."""
    import psycopg

    name = f"t{time.monotonic_ns()}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{url.rpartition('/')[0]}/{name}"


def _wait(port: int, server: subprocess.Popen) -> None:
    import psycopg

    deadline = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(f"postgresql://megapd@127.0.0.1:{port}/postgres", connect_timeout=2).close()
            return
        except psycopg.OperationalError:
            assert server.poll() is None, "PostgreSQL did not start"
            assert time.monotonic() < deadline, "PostgreSQL does not answer"
            time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
