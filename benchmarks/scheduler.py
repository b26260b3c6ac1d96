"""How fast the scheduler answers: heartbeats of a cluster's replicas and look-ups of its runs, on loopback.

    python benchmarks/scheduler.py [--runs 200] [--replicas 4] [--heartbeat-seconds 5] [--seconds 20] [--decisions 1000000]

Every run looks its assignment up once a second, every replica sends a heartbeat each --heartbeat-seconds (5, a third of the
default lease: 360 requests a second in all; 1: 1,000), all over connections that stay open, each at a moment of its own. The
service is a process of its own and has one core's worth of Python; the load is another. Then the same with `--decisions` in the
history. p50 and p99 are of whole requests as the client sees them, from the moment at which they were due.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from common import write_result
from sqlalchemy import insert, update

from megapd.scheduler.store import Store, runs, tokens
from megapd.scheduler.store.tables import decisions as decisions_table
from megapd.scheduler.store.tables import runs as runs_table


class Connection:
    """One HTTP/1.1 connection that stays open. httpx would take longer to ask than the service takes to answer."""

    def __init__(self, port: int, token: str) -> None:
        self._port, self._headers = port, f"Host: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = b"" if body is None else json.dumps(body).encode()
        kind = f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n" if data else ""
        self._writer.write(f"{method} {path} HTTP/1.1\r\n{self._headers}{kind}\r\n".encode() + data)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        answer = await self._reader.readexactly(int(length[1])) if length else b""
        return int(head[9:12]), json.loads(answer) if answer else None


async def load(arguments: argparse.Namespace, port: int, token: str, process: psutil.Process) -> dict[str, Any]:
    """Each kind of request: how many, p50, p99 and maximum in ms; errors; and what the service spent."""
    times: dict[str, list[float]] = defaultdict(list)
    errors: Counter[str] = Counter()
    begin = end = 0.0

    async def client(connection: Connection, kind: str, every: float, method: str, path: str, body: Any = None) -> None:
        due = begin + random.random() * every
        while due < end:
            await asyncio.sleep(due - time.perf_counter())
            try:
                status, _ = await connection.ask(method, path, body)
            except (OSError, asyncio.IncompleteReadError) as error:
                errors[type(error).__name__] += 1
                return
            times[kind].append(time.perf_counter() - due)
            if status >= 400:
                errors[f"{kind} {status}"] += 1
            due += every

    clients, registering = [], []
    for run in range(arguments.runs):
        looking = Connection(port, token)
        await looking.open()
        clients.append(client(looking, "assignment", 1.0, "GET", f"/v1/runs/r{run}/assignment"))
        for number in range(arguments.replicas):
            beating = Connection(port, token)
            await beating.open()
            body = {"group": f"r{run}", "endpoint": f"grpc://host{run}:{9000 + number}"}
            registering.append(beating.ask("PUT", f"/v1/replicas/r{run}-{number}", body))
            path = f"/v1/replicas/r{run}-{number}/beat"
            told = {"figures": {"tokens_per_second": 1e5}}
            clients.append(client(beating, "heartbeat", arguments.heartbeat_seconds, "POST", path, told))
    started = time.perf_counter()
    refused = [answer for status, answer in await asyncio.gather(*registering) if status >= 400]
    if refused:
        raise RuntimeError(f"registering {len(refused)} replicas: {refused[0]}")
    registered = time.perf_counter() - started
    # A full collection of this process, torch and all, takes 0.4 s, which would be the client's and not the service's.
    gc.collect()
    gc.freeze()
    begin = time.perf_counter() + 1.0
    end = begin + arguments.seconds
    before = process.cpu_times()
    await asyncio.gather(*clients)
    after = process.cpu_times()
    gc.unfreeze()
    spent = (after.user + after.system - before.user - before.system) / sum(map(len, times.values())) * 1e3
    found = {kind: quantiles(seconds) for kind, seconds in sorted(times.items())}
    spending = {"registering_seconds": round(registered, 3), "service_cpu_ms_a_request": round(spent, 3)}
    rate = sum(map(len, times.values())) / arguments.seconds
    return {"errors": dict(errors), "requests_a_second": round(rate), **found, **spending}


def quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    at = {f"p{q}_ms": ordered[min(len(ordered) - 1, len(ordered) * q // 100)] * 1e3 for q in (50, 99)}
    return {"count": len(ordered), **{name: round(value, 3) for name, value in at.items()}, "max_ms": round(ordered[-1] * 1e3, 3)}


@contextlib.contextmanager
def service(database: str) -> Iterator[tuple[int, psutil.Process]]:
    command = [sys.executable, "-m", "megapd", "scheduler", f"--scheduler.database={database}", "--scheduler.port=0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        told = next(line for line in process.stderr if line.startswith("megapd: scheduler on "))
        yield int(told.rpartition(":")[2]), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(20)


def prepare(database: str, count: int) -> str:
    """Runs with a schedule each, and a token."""
    store = Store(database)

    def write(connection: Any) -> str:
        for run in range(count):
            runs.put_run(connection, f"r{run}", trajectory=None, group=f"r{run}", steps=1 << 40, facts={})
            document = {"policy": "equal", "checkpoints": 4, "steps": 1000}
            runs.set_schedule(connection, f"r{run}", document, expected=0, effective=0, author="benchmark")
        return tokens.create_token(connection, "run", "benchmark")

    token = store.write(write)
    store.close()
    return token


def add_history(database: str, count: int, wanted: int) -> None:
    """Decisions until there are `wanted`, over all runs."""
    store = Store(database)
    each = wanted // count
    for run in range(count):
        rows = [
            {
                "run": f"r{run}",
                "sequence": i,
                "step": i,
                "checkpoint": i,
                "effective": i,
                "reason": "saturated",
                "evidence": '{"kl":0.1}',
                "created": 0.0,
            }
            for i in range(store.read(lambda c: runs.find_run(c, f"r{run}")["decisions"]), each)  # noqa: B023
        ]

        def write(connection: Any) -> None:
            if rows:  # noqa: B023
                connection.execute(insert(decisions_table), rows)  # noqa: B023
            connection.execute(update(runs_table).where(runs_table.c.name == f"r{run}").values(decisions=each))  # noqa: B023

        store.write(write)
    store.close()


def look_ups(port: int, token: str, count: int) -> dict[str, Any]:
    """One client, one request after the other: what a look-up costs alone."""

    async def ask() -> dict[str, Any]:
        connection = Connection(port, token)
        await connection.open()
        paths = {"assignment": "assignment", "schedule": "schedule", "decisions_page": "decisions?limit=1"}
        times: dict[str, list[float]] = defaultdict(list)
        for _ in range(500):
            run = random.randrange(count)
            for kind, path in paths.items():
                started = time.perf_counter()
                status, told = await connection.ask("GET", f"/v1/runs/r{run}/{path}")
                times[kind].append(time.perf_counter() - started)
                if status != 200:
                    raise RuntimeError(f"{path}: {status} {told}")
        return {kind: quantiles(found) for kind, found in times.items()}

    return asyncio.run(ask())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--heartbeat-seconds", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--decisions", type=int, default=1_000_000)
    parser.add_argument("--database", help="default: a new SQLite file")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scheduler.json"))
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        database = arguments.database or f"sqlite:///{folder}/scheduler.db"
        token = prepare(database, arguments.runs)
        for history in (1000, arguments.decisions):
            add_history(database, arguments.runs, history)
            with service(database) as (port, process):
                alone = look_ups(port, token, arguments.runs)
                under = asyncio.run(load(arguments, port, token, process))
            results[f"{history} decisions"] = {"alone": alone, "load": under}
            print(json.dumps({f"{history} decisions": results[f"{history} decisions"]}, indent=1), flush=True)
    packages = ("fastapi", "uvicorn", "uvloop", "httptools", "SQLAlchemy")
    write_result(arguments.output, "How fast does the scheduler answer?", arguments, packages, results=results)


if __name__ == "__main__":
    main()
