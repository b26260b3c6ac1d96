"""`megapd teacher` and `megapd record`: a teacher's own processes."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

from megapd.config import Adaptive, Config
from megapd.errors import UserError
from megapd.launch.local import local_command, local_environment
from megapd.tasks import build_task
from megapd.teacher.build import checkpoint_shape
from megapd.teacher.cache import SignalCache
from megapd.teacher.leases import advertised
from megapd.teacher.record import RecordSummary, record
from megapd.teacher.replica import Replica
from megapd.teacher.setup import open_source, open_trajectory, rank_agreement, resolve_plan, teacher_options
from megapd.world import join_world

log = logging.getLogger(__name__)

RESTART_SECONDS = (1.0, 30.0)  # wait before a replica that died is started again: doubled each time, from, to
STEADY_SECONDS = 60.0  # a replica that ran this long begins at the first wait again


def serve_teacher(config: Config, arguments: Sequence[str]) -> int:
    """Serve the configuration's teacher until SIGTERM or SIGINT; the exit code.

    arguments: of the command line, `teacher CONFIG --section.key=value ...`, with which replicas and ranks are started where this
    process is to be neither.
    """
    if config.teacher is None:
        raise UserError("teacher: this configuration has no teacher to serve; add the sections teacher and schedule")
    server = config.teacher.server
    if config.teacher.trajectory is None:
        raise UserError("teacher.trajectory: a server needs the checkpoints themselves; name their folder, or a model hf:REPO")
    if config.scheduler.url is not None:
        advertised(server, server.port)  # that it cannot be, known before the model is built
    if "WORLD_SIZE" not in os.environ and (server.replicas > 1 or server.ranks > 1):
        if server.replicas > 1 and server.port == 0:
            raise UserError("teacher.server.port: replicas listen on port + i, which 0 leaves open; name a port")
        return _Supervisor(config, arguments).run()
    _serve(config)
    return 0


def _serve(config: Config) -> None:
    from megapd.teacher.server import serve

    world = join_world()
    if world.rank > 0:
        # Rank 0 answers what is queued before it stops, and needs this rank for it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    trajectory = open_trajectory(config)
    replica = Replica(trajectory, world, teacher_options(config, served=True))
    replica.open(resolve_plan(config, trajectory).checkpoint_at(0))
    if world.rank > 0:
        replica.follow()
        return
    try:
        serve(config, replica, ready=lambda port: print(f"megapd: teaching on port {port}", file=sys.stderr, flush=True))
    finally:
        replica.close()


@dataclass
class _Replica:
    process: subprocess.Popen[bytes]
    started: float
    restart_at: float | None = None
    wait: float = RESTART_SECONDS[0]


class _Supervisor:
    """Replicas as processes of their own; one that dies is started again."""

    def __init__(self, config: Config, arguments: Sequence[str]) -> None:
        assert config.teacher is not None
        self._server, self._arguments = config.teacher.server, list(arguments)
        self._stopping = False

    def run(self) -> int:
        """Until SIGTERM or SIGINT, which is passed on; or until a replica refuses its settings: its exit code."""
        for ending in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ending, self._stop)
        replicas = [_Replica(self._start(number), time.monotonic()) for number in range(self._server.replicas)]
        code = 0
        try:
            while not self._stopping and code == 0:
                for number, replica in enumerate(replicas):
                    code = code or self._watch(number, replica)
                time.sleep(0.2)
        finally:
            for replica in replicas:
                self._terminate(replica.process)
            deadline = time.monotonic() + self._server.drain_seconds + 10.0
            for replica in replicas:
                try:
                    replica.process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    below = psutil.Process(replica.process.pid).children(recursive=True)
                    for process in [replica.process, *below]:
                        process.kill()
        return code

    def _terminate(self, process: subprocess.Popen[bytes]) -> None:
        """SIGTERM to a replica that runs. Where it has ranks, the process is DeepSpeed's runner, which ends without a word to its
        child, the launcher of the ranks: the launcher is told instead, ends the ranks, and the runner ends with it."""
        if process.poll() is not None:
            return
        launchers = psutil.Process(process.pid).children() if self._server.ranks > 1 else []
        for told in launchers or [process]:
            told.terminate()

    def _watch(self, number: int, replica: _Replica) -> int:
        code = replica.process.poll()
        if code is None:
            return 0
        if code == 2:  # a mistake in the settings, which another start would repeat
            return 2
        now = time.monotonic()
        if replica.restart_at is None:
            steady = now - replica.started > STEADY_SECONDS
            replica.wait = RESTART_SECONDS[0] if steady else min(2 * replica.wait, RESTART_SECONDS[1])
            replica.restart_at = now + replica.wait
            log.warning("teacher replica %d ended with code %d, starting it again in %g s", number, code, replica.wait)
        elif now >= replica.restart_at:
            replica.process, replica.started, replica.restart_at = self._start(number), now, None
        return 0

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        own = ["--teacher.server.replicas=1", f"--teacher.server.port={self._server.port + number if self._server.port else 0}"]
        for name in ("data_port", "metrics_port"):
            if port := getattr(self._server, name):
                own.append(f"--teacher.server.{name}={port + number}")
        arguments, ranks = [*self._arguments, *own], self._server.ranks
        command = local_command(arguments, ranks) if ranks > 1 else [sys.executable, "-m", "megapd", *arguments]
        return subprocess.Popen(command, env=local_environment(ranks * self._server.replicas))

    def _stop(self, number: int, frame: object) -> None:
        self._stopping = True


def record_signals(config: Config) -> RecordSummary | None:
    """Fill teacher.cache with the signals of the whole schedule; each rank records its share.

    Returns what all ranks did together, on rank 0; None on the others.
    """
    teacher = config.teacher
    if teacher is None or teacher.cache is None:
        raise UserError("teacher.cache: name the folder that signals are to be recorded in")
    if teacher.carrier == "cached":
        carrier = "served" if teacher.endpoints else "colocated"
        if carrier == "colocated" and teacher.trajectory is None:
            raise UserError("teacher.trajectory: recording needs a teacher; name its trajectory, or teacher.endpoints")
        config = config.model_copy(update={"teacher": teacher.model_copy(update={"carrier": carrier})})
    world = join_world()
    task, trajectory = build_task(config), open_trajectory(config)
    plan = resolve_plan(config, trajectory)
    if isinstance(config.schedule, Adaptive):
        raise UserError("schedule.policy: adaptive decides while a student trains, so its signals cannot be recorded ahead of it")
    stream = open_source(config, task, trajectory, plan, world, 0)
    mine = record(
        config,
        task,
        plan,
        trajectory,
        stream,
        SignalCache(teacher.cache),
        world.rank,
        world.size,
        classes=checkpoint_shape(stream.teacher(0)).classes,
        device=world.device,
        agree=rank_agreement(config, world),
    )
    parts = world.gather(mine)
    return RecordSummary.together(parts) if world.rank == 0 else None
