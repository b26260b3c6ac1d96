"""`megapd trajectory import` and `megapd trajectory verify NAME`: checkpoints and the scheduler's registry."""

from __future__ import annotations

from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path

from megapd.config import Config
from megapd.errors import UserError
from megapd.interrupts import until_signalled
from megapd.scheduler.client.http import Refusal
from megapd.scheduler.local import open_api
from megapd.scheduler.registry import import_trajectory, verify_trajectory, watch_trajectory
from megapd.trajectory.hugging_face import is_hugging_face

RETRY_SECONDS = 60.0  # an import outlives a service that starts again


def import_checkpoints(
    config: Config,
    source: str,
    *,
    steps: tuple[int, ...] = (),
    name: str | None = None,
    probe_samples: int = 0,
    watch: bool = False,
) -> int:
    """`megapd trajectory import FOLDER|hf:REPO [--as NAME] [--probe SAMPLES] [--watch]`.

    Into the service at scheduler.url, else into scheduler.database. probe_samples: held-out samples of the configuration's task
    on which each checkpoint's loss is measured, 0: none. watch: go on until SIGTERM or SIGINT with what a teacher writes.
    """
    probe = None
    if probe_samples:
        from megapd.evaluation.probe import TaskProbe  # builds models: no other verb of the scheduler needs them

        probe = TaskProbe(config, probe_samples)

    def told(step: int) -> None:
        print(f"step {step}", flush=True)

    with open_api(config.scheduler, create=True, retry_seconds=RETRY_SECONDS) as api:
        if watch:
            with until_signalled() as stop:
                watch_trajectory(api, source, stop, name=name, probe=probe, told=told)
            return 0
        if not steps and config.teacher is not None and is_hugging_face(source):
            steps = config.teacher.steps
        done = import_trajectory(api, source, steps=steps, name=name, probe=probe)
    print(f"{done.digest}  {len(done.added)} checkpoints added, {len(done.known)} known")
    return 0


def verify_checkpoints(config: Config, reference: str, *, accept: bool = False) -> int:
    """`megapd trajectory verify NAME [--accept]` of a registered trajectory; 1 if one is flagged and not accepted."""
    looked = f"{reference}: there is no folder {Path(reference).absolute()}"
    with ExitStack() as stack:
        try:
            api = stack.enter_context(open_api(config.scheduler, retry_seconds=RETRY_SECONDS))
        except UserError as error:
            raise UserError(f"{looked}, and no registered trajectory can be looked up: {error}") from error
        try:
            flagged = verify_trajectory(api, reference, accept=accept)
        except Refusal as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            fix = "correct it, or register the trajectory with `megapd trajectory import FOLDER --as NAME`"
            raise UserError(f"{looked}, and no registered trajectory of that name or digest; {fix}") from error
    for checkpoint in flagged:
        for flag in checkpoint["flags"]:
            accepted = f" (accepted by {flag['accepted_by']})" if flag["accepted_by"] else ""
            print(f"step {checkpoint['step']}: {flag['kind']}: {flag['detail']}{accepted}")
    open_flags = [flag for checkpoint in flagged for flag in checkpoint["flags"] if flag["accepted_by"] is None]
    print(f"{reference}: {len(flagged)} checkpoints flagged, {len(open_flags)} flags not accepted")
    return 1 if open_flags else 0
