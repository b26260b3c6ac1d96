"""Several ranks on this machine, through the deepspeed launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import yaml

from megapd.config import ENV_PREFIX
from megapd.errors import masked


def launch_local(
    arguments: Sequence[str], ranks: int, *, log: Path | None = None, environment: Mapping[str, str] | None = None
) -> int:
    """Run `megapd ARGUMENTS` on `ranks` local ranks and return the exit code.

    environment: instead of this process's, see `local_environment`. log: a file for all output; default: the terminal.
    """
    command, environment = local_command(arguments, ranks), local_environment(ranks, environment)
    with log.open("w") if log is not None else nullcontext() as output:
        return subprocess.run(command, env=environment, stdout=output, stderr=output, check=False).returncode


def local_command(arguments: Sequence[str], ranks: int) -> list[str]:
    """The deepspeed launcher's command line for `megapd ARGUMENTS` on `ranks` local ranks."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", os.devnull, "--num_gpus", str(ranks)]
    return [*launcher, "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--module", "megapd", *arguments]


def local_environment(ranks: int, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """`environment`, by default this process's, with an equal share of the cores a rank unless OMP_NUM_THREADS is set.

    On a machine with too few GPUs for the ranks, though with some, they run on the CPU.
    """
    environment = dict(os.environ if environment is None else environment)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if 0 < torch.cuda.device_count() < ranks:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def without_secrets(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Arguments of a `megapd` to be started, and the environment that has the settings with secrets: whoever is on the machine
    sees a process's arguments, its environment its owner alone."""
    shown, environment = [], {}
    for argument in arguments:
        if masked(argument) == argument:
            shown.append(argument)
            continue
        name, _, value = argument.removeprefix("--").partition("=")
        parsed = yaml.safe_load(value)
        environment[f"{ENV_PREFIX}{name.upper().replace('.', '__')}"] = parsed if isinstance(parsed, str) else json.dumps(parsed)
    return shown, environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
