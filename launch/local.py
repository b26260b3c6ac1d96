"""Several ranks on this machine, through the deepspeed launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path


def launch_local(arguments: Sequence[str], ranks: int, *, log: Path | None = None) -> int:
    """Run `megapd ARGUMENTS` on `ranks` local ranks and return the exit code.

    Each rank gets an equal share of the cores for its threads, unless OMP_NUM_THREADS says otherwise.
    log: a file for all output; default: the terminal.
    """
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    with log.open("w") if log is not None else nullcontext() as output:
        return subprocess.run(
            local_command(arguments, ranks), env=environment, stdout=output, stderr=output, check=False
        ).returncode


def local_command(arguments: Sequence[str], ranks: int) -> list[str]:
    """The deepspeed launcher's command line for `megapd ARGUMENTS` on `ranks` local ranks."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", os.devnull, "--num_gpus", str(ranks)]
    return [*launcher, "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--module", "megapd", *arguments]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
