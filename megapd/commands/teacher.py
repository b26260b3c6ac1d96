"""`megapd teacher`: replicas of the teacher, in this process or in processes of their own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from megapd.commands.progress import Progress
from megapd.config import Config
from megapd.errors import UserError
from megapd.interrupts import ENDING
from megapd.processes.supervisor import Supervisor
from megapd.schedule.resolve import resolve_plan
from megapd.scheduler.client.lease import advertised
from megapd.teacher.engine import Replica
from megapd.teacher.locate import open_trajectory
from megapd.teacher.server import serve
from megapd.teacher.setup import teacher_options
from megapd.world import join_world


def serve_teacher(config: Config, arguments: Sequence[str]) -> int:
    """Serve the configuration's teacher until SIGTERM or SIGINT; the exit code.

    arguments: of the command line, `teacher CONFIG --section.key=value ...`, with which replicas and ranks are started.
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
        return Supervisor(config, arguments).run()
    _serve(config)
    return 0


def _serve(config: Config) -> None:
    world = join_world()
    if world.rank > 0:
        # Rank 0 answers what is queued before it stops, and needs this rank for it.
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
    trajectory = open_trajectory(config)
    replica = Replica(trajectory, world, teacher_options(config, served=True))
    replica.open(resolve_plan(config, trajectory).checkpoint_at(0))
    if world.rank > 0:
        replica.follow()
        return
    progress, before = Progress("teacher", unit="tokens answered", seconds=0.0), 0

    def ready(port: int) -> None:
        print(f"megapd: teaching on port {port}", file=sys.stderr, flush=True)
        assert config.teacher is not None
        where = f"{config.teacher.trajectory}, {len(trajectory.steps)} checkpoints"
        progress.say(f"{where}, {config.teacher.sharding} on {world.size} ranks, {world.device.type}")

    def told(tokens: int) -> None:
        nonlocal before
        if tokens != before:
            progress.update(tokens)
        before = tokens

    try:
        serve(config, replica, ready=ready, told=told)
    finally:
        replica.close()
    progress.close(f"ended, {before:,} tokens answered")
