"""`megapd teacher` as processes of the tests' own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.forked import Forked, environment

START_SECONDS = 120.0


class Server:
    """One `megapd teacher`, in a process group of its own; what it prints is kept for failures.

    ranks: of its own, joined without a launcher; None: whatever the command itself starts, by its settings
    """

    process: subprocess.Popen[bytes] | Forked

    def __init__(self, arguments: Sequence[str], port: int, ranks: int | None = 1) -> None:
        self.arguments, self.port, self.ranks = list(arguments), port, ranks
        self.endpoint = f"grpc://127.0.0.1:{port}"
        self.output = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115, as long as the server
        self.start()

    def start(self) -> None:
        arguments = ["teacher", *self.arguments, f"--teacher.server.port={self.port}"]
        if self.ranks is None:
            command = [sys.executable, "-m", "megapd", *arguments]
            self.process = subprocess.Popen(
                command, env=environment(), stdout=self.output, stderr=self.output, start_new_session=True
            )
        else:
            self.process = Forked("megapd", arguments, environment(), Path(self.output.name), self.ranks)

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
        self.output.seek(0)
        return self.output.read()[-4000:]
