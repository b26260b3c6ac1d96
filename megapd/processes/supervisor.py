"""Several replicas of the teacher as processes of one command."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

from megapd.config import Config
from megapd.interrupts import until_signalled
from megapd.network import doubled
from megapd.processes.local import local_command, local_environment, without_secrets

log = logging.getLogger(__name__)

RESTART_SECONDS = (1.0, 30.0)  # wait before a replica that died is started again: doubled each time, from, to
STEADY_SECONDS = 60.0  # a replica that ran this long begins at the first wait again
WATCH_SECONDS = 0.2  # between looks at the replicas
END_SECONDS = 10.0  # beside teacher.server.drain_seconds, for a process to end


@dataclass
class _Replica:
    """failures: in a row, each soon after a start. restart_at: None while it runs."""

    process: subprocess.Popen[bytes]
    started: float
    failures: int = 0
    restart_at: float | None = None


class Supervisor:
    """Replicas as processes of their own; one that dies is started again."""

    def __init__(self, config: Config, arguments: Sequence[str]) -> None:
        assert config.teacher is not None
        self._server = config.teacher.server
        self._arguments, secret = without_secrets(arguments)
        self._environment = {**os.environ, **secret}

    def run(self) -> int:
        """Until SIGTERM or SIGINT, which is passed on; or until a replica refuses its settings: its exit code."""
        with until_signalled() as stop:
            replicas = [_Replica(self._start(number), time.monotonic()) for number in range(self._server.replicas)]
            code = 0
            try:
                while code == 0 and not stop.wait(WATCH_SECONDS):
                    for number, replica in enumerate(replicas):
                        code = code or self._watch(number, replica)
            finally:
                self._end([replica.process for replica in replicas])
        return code

    def _end(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        """Tell all, wait for what they still answer, and kill what is left.

        Where a replica has ranks, its process is DeepSpeed's runner, which ends without a word to its child, the launcher of the
        ranks: the launcher is told instead, ends the ranks, and the runner ends with it.
        """
        for process in processes:
            if process.poll() is None:
                launchers = psutil.Process(process.pid).children() if self._server.ranks > 1 else []
                for told in launchers or [process]:
                    told.terminate()
        deadline = time.monotonic() + self._server.drain_seconds + END_SECONDS
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                for left in [process, *psutil.Process(process.pid).children(recursive=True)]:
                    left.kill()

    def _watch(self, number: int, replica: _Replica) -> int:
        code = replica.process.poll()
        if code is None or code == 2:  # it runs, or there is a mistake in the settings, which another start would repeat
            return code or 0
        now = time.monotonic()
        if replica.restart_at is None:
            replica.failures = 0 if now - replica.started > STEADY_SECONDS else replica.failures + 1
            wait = doubled(RESTART_SECONDS, replica.failures + 1)
            replica.restart_at = now + wait
            log.warning("teacher replica %d ended with code %d, starting it again in %g s", number, code, wait)
        elif now >= replica.restart_at:
            replica.process, replica.started, replica.restart_at = self._start(number), now, None
        return 0

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        own = ["--teacher.server.replicas=1", f"--teacher.server.port={self._server.port + number if self._server.port else 0}"]
        if self._server.metrics_port:
            own.append(f"--teacher.server.metrics_port={self._server.metrics_port + number}")
        arguments, ranks = [*self._arguments, *own], self._server.ranks
        command = local_command(arguments, ranks) if ranks > 1 else [sys.executable, "-m", "megapd", *arguments]
        return subprocess.Popen(command, env=local_environment(ranks * self._server.replicas, self._environment))
