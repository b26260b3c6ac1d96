"""RemoteTrajectory: what the teacher's replicas say about their checkpoints, for a student that has no folder of them."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from megapd.config import Teacher as TeacherConfig
from megapd.errors import TeacherLost, UserError
from megapd.teacher.replicas import Endpoints, Remote, Replicas
from megapd.teacher.wire import decode_catalogue
from megapd.trajectory import Checkpoint, CheckpointTimeout
from megapd.trajectory.reader import nearest_steps

ANSWER_SECONDS = 15.0  # longest wait for a replica: some tries at each


class RemoteTrajectory:
    """As trajectory.Trajectory, without weights; `path` of its checkpoints is the endpoints' names, for messages. Thread-safe.

    Descriptions are asked for once a checkpoint. Every method raises UserError where no replica answers within some tries.
    """

    incomplete: tuple[int, ...] = ()  # a server names complete checkpoints alone

    def __init__(self, config: TeacherConfig, endpoints: Endpoints) -> None:
        """endpoints: closed with this."""
        self._replicas = Replicas(config, endpoints)
        self._steps: tuple[int, ...] = ()
        self._known: dict[int, Checkpoint] = {}
        self._lock = threading.Lock()
        try:
            self.refresh()
        except BaseException:
            self.close()
            raise

    @property
    def steps(self) -> tuple[int, ...]:
        """Teacher steps of the complete checkpoints, increasing, at construction or the last `refresh`."""
        return self._steps

    def refresh(self) -> tuple[int, ...]:
        """Ask again which checkpoints there are; returns `steps`."""
        self._ask([])
        return self._steps

    def checkpoint(self, step: int) -> Checkpoint:
        """Everything but weights and files; UserError if it is not there (the nearest are listed)."""
        if not self.written(step):
            nearest = nearest_steps(self.refresh(), step)
            there = f"the nearest are {', '.join(map(str, nearest))}" if nearest else "there are none"
            raise UserError(
                f"{self._replicas.describe()}: no checkpoint of step {step}; {there}: "
                f"change the schedule, or train the teacher further"
            )
        return self._known[step]

    def written(self, step: int) -> bool:
        """Whether the teacher has the checkpoint of `step` now."""
        if step not in self._known:
            self._ask([step])
        return step in self._known

    def wait_for(self, step: int, timeout_seconds: float, poll_seconds: float = 0.5) -> Checkpoint:
        """The checkpoint of `step` as soon as the teacher has it; CheckpointTimeout if it has not after `timeout_seconds`."""
        deadline = time.monotonic() + timeout_seconds
        while not self.written(step):
            left = deadline - time.monotonic()
            if left <= 0:
                newest = f"the newest there is of step {self._steps[-1]}" if self.refresh() else "there is none yet"
                raise CheckpointTimeout(f"the served teacher: no checkpoint of step {step} after {timeout_seconds:g} s; {newest}")
            time.sleep(min(poll_seconds, left))
        return self._known[step]

    def close(self) -> None:
        self._replicas.close()

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
            self._steps = tuple(sorted({*self._steps, *there}))
            self._known.update(found)
