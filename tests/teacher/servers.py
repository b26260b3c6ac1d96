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

from tests.training.runs import environment

START_SECONDS = 120.0


class Server:
    """One `megapd teacher`, in a process group of its own; what it prints is kept for failures."""

    def __init__(self, arguments: Sequence[str], port: int) -> None:
        self.arguments, self.port = list(arguments), port
        self.endpoint = f"grpc://127.0.0.1:{port}"
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115, as long as the server
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "megapd", "teacher", *self.arguments, f"--teacher.server.port={self.port}"]
        self.process = subprocess.Popen(
            command, env=environment(), stdout=self.output, stderr=self.output, start_new_session=True
        )

    def wait(self) -> None:
        """Until it listens."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None, f"the teacher ended with {self.process.returncode}: {self.printed()}"
            assert time.monotonic() < deadline, f"the teacher does not listen: {self.printed()}"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)

    def send(self, number: int) -> None:
        """A signal to all of its processes."""
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
