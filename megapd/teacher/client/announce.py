"""Announcer: tells every replica the checkpoint of the next rotation long before it, and the user if one cannot have it."""

from __future__ import annotations

import json
import logging
import threading

from megapd.errors import UserError
from megapd.teacher.client.replicas import Replicas, classify
from megapd.teacher.wire.calls import parse_json
from megapd.trajectory import Checkpoints

log = logging.getLogger(__name__)

AGAIN_SECONDS = 1.0  # between looks whether the replicas are done
CALL_SECONDS = 10.0


class Announcer:
    """One thread that asks the replicas to prepare, again and again until each has verified the checkpoint.

    It goes on looking for others: a replica that comes late, or that went and came back, is told too. Errors are logged once a
    replica, checkpoint and message.
    """

    def __init__(self, replicas: Replicas, trajectory: Checkpoints) -> None:
        self._replicas, self._trajectory = replicas, trajectory
        self._wanted: tuple[int, int] | None = None
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None
        self._told: set[tuple[int, str, str]] = set()

    def announce(self, student_step: int, teacher_step: int) -> None:
        """From `student_step` on, teacher step `teacher_step` teaches. Returns at once."""
        if self._wanted == (student_step, teacher_step) or self._replicas.closed.is_set():
            return
        self._wanted = (student_step, teacher_step)
        self._changed.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="teacher-announcer", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """After the replicas' `close`; the thread, a daemon, ends with its present call."""
        self._changed.set()

    def _run(self) -> None:
        ready: set[str] = set()
        while not self._replicas.closed.is_set():
            if self._changed.is_set():
                self._changed.clear()
                ready.clear()
            assert self._wanted is not None
            self._tell_all(*self._wanted, ready)
            self._changed.wait(AGAIN_SECONDS)

    def _tell_all(self, student_step: int, teacher_step: int, ready: set[str]) -> None:
        """One round about the replicas that are not in `ready`, which gains those that are."""
        remotes = self._replicas.current()
        ready.intersection_update(remote.address for remote in remotes)  # one that went may come back as another process
        missing = [remote for remote in remotes if remote.address not in ready]
        if not missing:
            return
        try:
            if not self._trajectory.written(teacher_step):
                return
            checkpoint = self._trajectory.checkpoint(teacher_step)
        except (UserError, OSError) as error:
            self._tell(student_step, teacher_step, "the student", str(error))
            return
        body = json.dumps({"step": teacher_step, "teacher": checkpoint.digest}).encode()
        for remote in missing:
            if self._changed.is_set():
                return
            try:
                if parse_json(remote.action("prepare", body, CALL_SECONDS)).get("ready"):
                    ready.add(remote.address)
            except Exception as error:  # whatever it is, the user hears of it and the thread goes on
                if not self._replicas.closed.is_set():
                    self._tell(student_step, teacher_step, remote.address, classify(error)[1])

    def _tell(self, student_step: int, teacher_step: int, who: str, message: str) -> None:
        if (teacher_step, who, message) not in self._told:
            self._told.add((teacher_step, who, message))
            text = "teacher step %d, which is to teach from student step %d on, is not ready: %s: %s"
            log.error(text, teacher_step, student_step, who, message)
