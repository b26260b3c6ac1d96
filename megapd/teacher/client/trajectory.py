"""RemoteTrajectory: what the teacher's replicas say about their checkpoints, for a student that has no folder of them."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from megapd.config import TeacherConfig
from megapd.errors import TeacherLost, UserError
from megapd.teacher.client.replicas import Endpoints, Remote, Replicas
from megapd.teacher.wire.calls import decode_catalogue
from megapd.trajectory import Checkpoint, Checkpoints

ANSWER_SECONDS = 15.0  # longest wait for a replica: some tries at each


class RemoteTrajectory(Checkpoints):
    """As trajectory.Trajectory, without weights; `path` of its checkpoints is the endpoints' names, for messages. Thread-safe.

    Descriptions are asked for once a checkpoint; a server names complete ones alone. Every method raises UserError where no
    replica answers within some tries.
    """

    remote = True

    def __init__(self, config: TeacherConfig, endpoints: Endpoints) -> None:
        """endpoints: closed with this."""
        super().__init__()
        self._replicas = Replicas(config, endpoints)
        self._known: dict[int, Checkpoint] = {}
        self._lock = threading.Lock()
        try:
            self.refresh()
        except BaseException:
            self.close()
            raise

    def refresh(self) -> tuple[int, ...]:
        self._ask([])
        return self.steps

    def checkpoint(self, step: int) -> Checkpoint:
        if not self.written(step):
            found = f"{self._replicas.describe()}: no checkpoint of step {step}; {self._nearest(step)}"
            raise UserError(f"{found}: change the schedule, or train the teacher further")
        return self._known[step]

    def written(self, step: int) -> bool:
        if step not in self._known:
            self._ask([step])
        return step in self._known

    def wait_for(self, step: int, timeout_seconds: float, poll_seconds: float = 0.5) -> Checkpoint:
        """As Checkpoints.wait_for; a look is a call to a replica, so they are fewer."""
        return super().wait_for(step, timeout_seconds, poll_seconds)

    def close(self) -> None:
        self._replicas.close()

    def _late(self, what: str) -> str:
        return f"the served teacher: {what}; {self._newest()}"

    def _ask(self, steps: list[int]) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        body = json.dumps({"steps": steps}).encode()

        def do(remote: Remote, seconds: float) -> tuple[tuple[int, ...], dict[int, Checkpoint]]:
            return decode_catalogue(remote.action("trajectory", body, seconds), Path(remote.address))

        try:
            there, found = self._replicas.ask("the teacher's trajectory", do, lambda: deadline)
        except TeacherLost as error:
            raise UserError(f"teacher.endpoints: {error}; start the teacher, `megapd teacher CONFIG`") from error
        with self._lock:
            self.steps = tuple(sorted({*self.steps, *there}))
            self._known.update(found)
