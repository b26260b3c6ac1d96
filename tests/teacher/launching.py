"""Teachers and students as processes of their own: `megapd teacher`, launches of students, and what is asked of both."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.forked import Forked, environment
from tests.teacher.teachers import MODELS, write_trajectory
from tests.training.runs import last_step, metrics

START_SECONDS = 120.0


class Server:
    """One `megapd teacher`, in a process group of its own; what it prints is kept for failures.

    ranks: of its own, joined without a launcher; None: whatever the command itself starts, by its settings
    """

    process: subprocess.Popen[bytes] | Forked

    def __init__(self, arguments: Sequence[str], port: int, ranks: int | None = 1) -> None:
        self.arguments, self.port, self.ranks = list(arguments), port, ranks
        self.endpoint = f"grpc://127.0.0.1:{port}"
        descriptor, name = tempfile.mkstemp()
        os.close(descriptor)
        self.output = Path(name)
        weakref.finalize(self, self.output.unlink, missing_ok=True)
        self.start()

    def start(self) -> None:
        arguments = ["teacher", *self.arguments, f"--teacher.server.port={self.port}"]
        if self.ranks is None:
            command = [sys.executable, "-m", "megapd", *arguments]
            with self.output.open("a") as output:
                self.process = subprocess.Popen(command, env=environment(), stdout=output, stderr=output, start_new_session=True)
        else:
            self.process = Forked("megapd", arguments, environment(), self.output, self.ranks)

    def wait(self) -> None:
        """Until it listens."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None, f"the teacher ended with {self.process.returncode}: {self.printed()}"
            assert time.monotonic() < deadline, f"the teacher does not listen: {self.printed()}"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)

    def send(self, number: int) -> None:
        """A signal to all of its processes."""
        if isinstance(self.process, Forked):
            self.process.send_to_groups(number)
        else:
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait(30)

    def stop(self) -> int:
        """Ask it to end, and its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()
        with contextlib.suppress(ProcessLookupError):
            self.send(signal.SIGKILL)  # ranks that outlived their launcher
        return self.process.returncode

    def printed(self) -> str:
        return self.output.read_text()[-4000:]


STEPS, REFRESH = 32, 8
TEACHERS = tuple(range(REFRESH, STEPS + 1, REFRESH))
LAUNCH_SECONDS, RUN_SECONDS = 120.0, 120.0
# A micro-batch's answer is 32 x 64 hidden states in fp32, 8 KiB.
TEACHER_MODEL = ["--model.hidden=64", "--training.global_batch=128"]
COMMON = [
    *("--task.kind=hierarchical_parity", "--task.dimension=21", "--task.degree=3", "--task.labels=8"),
    *("--training.global_batch=128", "--training.micro_batch=32", f"--training.steps={STEPS}", "--optimizer.lr=0.01"),
    *("--schedule.policy=matched", f"--schedule.refresh={REFRESH}", "--teacher.signal=hidden"),
]
STUDENT = [
    *("--model.kind=mlp", "--model.width=12", "--evaluation.samples=64", "--checkpoint.every=0"),
    *("--telemetry.every=1", "--telemetry.wandb=disabled", "--telemetry.progress=false", "--teacher.carrier=served"),
]
SERVER = ["--teacher.server.token_budget=1", "--teacher.server.drain_seconds=5"]


def free_ports(count: int = 1) -> int:
    """The first of `count` free ports, outside the range that clients' own ports are taken from: a teacher that is down for some
    seconds must find its port again."""
    while True:
        first = random.randrange(20000, 32000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


class Students:
    """Runs of two ranks, one after the other under one launch. A run that hangs costs the next one a new launch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: Forked | None = None
        self.launches = 0

    def launch(self) -> None:
        self.launches += 1
        self.jobs = self.folder / f"launch-{self.launches}"
        self.jobs.mkdir()
        self.number = 0
        self.output = self.jobs / "output"
        self.output.touch()
        self.process = Forked("tests.teacher.chaos_worker", [str(self.jobs)], environment(), self.output, ranks=2)

    def ranks(self) -> list[int]:
        """Process ids, by rank."""
        paths = [self.jobs / f"rank-{rank}" for rank in range(2)]
        self.until(lambda: all(path.exists() and path.read_text() for path in paths), LAUNCH_SECONDS)
        return [int(path.read_text()) for path in paths]

    def until(self, done, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the students ended, or hang: {self.where()}")
            time.sleep(0.005)

    def run(self, name: str, arguments: list[str], pauses: tuple[int, ...] = ()) -> Job:
        if self.process is None:
            self.launch()
        self.ranks()
        job = Job(self, self.number, self.folder / name)
        self.number += 1
        asked = {"arguments": [*COMMON, *STUDENT, f"--runs_dir={self.folder}", f"--name={name}", *arguments], "pauses": pauses}
        (self.jobs / "writing").write_text(json.dumps(asked))
        (self.jobs / "writing").rename(self.jobs / f"run-{job.number}.json")
        return job

    def where(self) -> str:
        """What the ranks printed and where their threads are; they are ended."""
        for path in self.jobs.glob("rank-*"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGUSR2)
        time.sleep(0.5)
        self.kill()
        return self.output.read_text()[-12000:]

    def kill(self) -> None:
        self.process.kill()
        self.process = None

    def close(self) -> None:
        if self.process is not None:
            self.kill()


class Job:
    """A run under way. results: what each rank told of it, see chaos_worker.train."""

    def __init__(self, students: Students, number: int, folder: Path) -> None:
        self.students, self.number, self.folder = students, number, folder

    def at(self, step: int) -> None:
        """Wait until the student is about to take the signals of `step`."""
        self.students.until((self.students.jobs / f"at-{self.number}-{step}").exists, RUN_SECONDS)

    def go(self, step: int) -> None:
        (self.students.jobs / f"go-{self.number}-{step}").touch()

    def until_stalled(self, seconds: float = 0.7) -> int:
        """Wait until no step was logged for so long, and the last one's number: a signal is then being waited for."""
        step, since = last_step(self.folder), time.monotonic()
        while time.monotonic() - since < seconds:
            time.sleep(0.02)
            if last_step(self.folder) != step:
                step, since = last_step(self.folder), time.monotonic()
        assert step < STEPS
        return step

    def results(self, seconds: float = RUN_SECONDS) -> list[dict]:
        paths = [self.students.jobs / f"result-{self.number}-{rank}.json" for rank in range(2)]
        self.students.until(lambda: all(path.exists() for path in paths), seconds)
        return [json.loads(path.read_text()) for path in paths]

    def finished(self) -> list[dict]:
        results = self.results()
        assert [result["code"] for result in results] == [0, 0], results
        return results


class Stage:
    """What the tests share: trajectories, teachers, the students' launch. All start at once; each test waits for what it needs.

    first: a teacher alone; pair: a supervisor with two replicas of the same; other: a teacher of another run, with equal steps
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        self.runs.mkdir()
        write_trajectory(folder / "right", "gpt", *TEACHER_MODEL, steps=TEACHERS)
        write_trajectory(folder / "wrong", "gpt", *TEACHER_MODEL, "--model.ffn=65", steps=TEACHERS)
        self.token = folder / "token"
        self.token.write_text(secrets.token_hex(32))
        self.servers: list[Server] = []
        self.first = self.server()
        self.students = Students(self.runs)
        self.students.launch()
        self.other = self.server("wrong")
        self.pair = self.server("right", "--teacher.server.replicas=2", ports=2, ranks=None)
        self.replicas = [f"grpc://127.0.0.1:{self.pair.port + number}" for number in range(2)]

    def server(self, trajectory: str = "right", *overrides: str, ports: int = 1, ranks: int | None = 1) -> Server:
        settings = [*COMMON, *MODELS["gpt"], f"--teacher.trajectory={self.folder / trajectory}", f"--teacher.token={self.token}"]
        server = Server([*settings, *SERVER, *overrides], free_ports(ports), ranks)
        self.servers.append(server)
        return server

    def student(self, name: str, endpoints: list[str], *overrides: str, pauses: tuple[int, ...] = ()) -> Job:
        arguments = [f"--teacher.trajectory={self.folder / 'right'}", f"--teacher.endpoints=[{','.join(endpoints)}]"]
        return self.students.run(name, [*arguments, f"--teacher.token={self.token}", *overrides], pauses)

    def close(self) -> None:
        self.students.close()
        for server in self.servers:
            with contextlib.suppress(ProcessLookupError):
                server.send(signal.SIGKILL)
            server.process.wait(30)


def told(results: list[dict]) -> str:
    return "\n".join(result["printed"] + result["error"] for result in results)


def counted(results: list[dict], key: str) -> int:
    return sum(result["counts"][key] for result in results)


def sources(results: list[dict]) -> list[str]:
    """Where the signals of each step came from, as all ranks say."""
    assert results[0]["sources"] == results[1]["sources"]
    return [source for _, source in results[0]["sources"]]


def trained(folder: Path) -> list[dict]:
    return [record for record in metrics(folder) if record["kind"] == "train"]


def without_counts(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if not k.startswith("steps_from_")} for record in records]


def up(server: Server, replicas: int = 1) -> None:
    """Until each replica listens; a server that a test before left dead is started."""
    if server.process.poll() is not None:
        server.start()
    deadline = time.monotonic() + LAUNCH_SECONDS
    for port in range(server.port, server.port + replicas):
        while True:
            assert server.process.poll() is None, server.printed()
            assert time.monotonic() < deadline, server.printed()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)


def children(server: Server, argument: str) -> list[psutil.Process]:
    """The processes below a supervisor that have this argument."""
    found = psutil.Process(server.process.pid).children(recursive=True)
    return [process for process in found if argument in process.cmdline()]


def replica_of(server: Server, number: int) -> psutil.Process:
    (found,) = children(server, f"--teacher.server.port={server.port + number}")
    return found


def ends_cleanly(server: Server) -> None:
    below = psutil.Process(server.process.pid).children(recursive=True)
    server.process.terminate()
    assert server.process.wait(60) == 0, server.printed()
    _, left = psutil.wait_procs(below, 5.0)  # one that was killed is there until init has seen to it
    assert not left


def ranks_of(server: Server) -> dict[int, psutil.Process]:
    return {rank: process for rank in range(2) for process in children(server, f"--local_rank={rank}")}
