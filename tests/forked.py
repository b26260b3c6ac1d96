"""Processes forked from one that has imported megapd.

The imports cost a process 5 to 10 seconds of CPU time, most of what tests with many short processes would take. A forked process
is `python -m MODULE ARGUMENTS` otherwise, with a session and an environment of its own.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megapd.processes.local import free_port, local_environment

_PR_SET_PDEATHSIG = 1
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["megapd.cli", "megapd.training.loop", "megapd.commands.teacher", "megapd.teacher.server.flight"])


class Forked:
    """`python -m MODULE ARGUMENTS` on one or more ranks, with the methods of subprocess.Popen.

    environment: of every rank, which gets in addition what torch's env:// asks for where there are several
    output: a file that exists, to which all that is printed is appended
    """

    def __init__(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], output: Path, ranks: int = 1
    ) -> None:
        world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self._ranks = []
        for rank in range(ranks):
            own = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            asked = (module, list(arguments), {**environment, **own}, str(output))
            self._ranks.append(_context.Process(target=_run, args=asked, daemon=True))
        for process in self._ranks:
            process.start()
        self.pids = [process.pid for process in self._ranks if process.pid is not None]
        self.pid = self.pids[0]
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, None while it runs. The first rank that fails ends the others, as under the deepspeed launcher."""
        codes = [process.exitcode for process in self._ranks]
        failed = [code for code in codes if code]
        if failed:
            self._end()
        if self.returncode is None and (failed or None not in codes):
            self.returncode = failed[0] if failed else 0
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit code; raises subprocess.TimeoutExpired, as Popen does."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"ranks {self.pids}", timeout)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        """To each rank alone, not to what it started."""
        for process, pid in zip(self._ranks, self.pids, strict=True):
            if process.exitcode is None:
                os.kill(pid, number)

    def send_to_groups(self, number: int) -> None:
        for process, pid in zip(self._ranks, self.pids, strict=True):
            if process.exitcode is None:
                (os.killpg if os.getpgid(pid) == pid else os.kill)(pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self._end()
        self.poll()

    def _end(self) -> None:
        for process in self._ranks:
            process.kill()
            process.join(30)


def _run(module: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing outlives tests that are killed
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def environment() -> dict[str, str]:
    """Of processes that run beside each other on a test machine."""
    return {**local_environment(2), "OMP_NUM_THREADS": "1"}


def run_ranks(module: str, arguments: Sequence[str], ranks: int = 2, seconds: float = 500.0) -> str:
    """`python -m MODULE ARGUMENTS` on these ranks to its end, and what it printed; an AssertionError with that where it fails."""
    with tempfile.NamedTemporaryFile("r") as output:
        process = Forked(module, arguments, environment(), Path(output.name), ranks)
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
        printed = output.read()
    assert code == 0, printed[-9000:]
    return printed
