"""What a run's schedule resolved to, kept in the run's folder: a resumed run is taught as the first start decided."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from megapd.errors import UserError
from megapd.files import write_atomic
from megapd.schedule.plan import Plan
from megapd.trajectory import Checkpoint

log = logging.getLogger(__name__)


class ScheduleRecord:
    """Rotations and the digests of the checkpoints that taught, in schedule.json.

    A trajectory that grew or changed since the run began must not change what a resumed run learns.
    """

    def __init__(
        self, path: Path, plan: Plan, *, resumed: bool, writes: bool, registered: Mapping[int, str] | None = None
    ) -> None:
        """registered: teacher step -> digest that the scheduler has of it, as far as it has one. Raises UserError if a resumed
        run's schedule no longer resolves to what was recorded."""
        self._path, self._writes, self._registered = path, writes, registered or {}
        self._digests: dict[int, str] = {}
        rotations = [list(rotation) for rotation in plan.fixed()]
        if resumed and path.exists():
            recorded = json.loads(path.read_text())
            self._digests = {int(step): digest for step, digest in recorded["digests"].items()}
            if recorded["rotations"] != rotations:
                pairs = zip_longest(rotations, recorded["rotations"])
                now, before = next((_shown(a), _shown(b)) for a, b in pairs if a != b)
                raise UserError(
                    f"schedule: it resolves to {now} now, but this run began with {before} ({path}); the trajectory has changed: "
                    f"restore it, or name its checkpoints with schedule.policy explicit"
                )
        self._rotations = rotations

    def confirm(self, checkpoint: Checkpoint) -> None:
        """Record the digest of a checkpoint that is about to teach; UserError if another one was recorded or registered for its
        step."""
        known = self._registered.get(checkpoint.step, checkpoint.digest)
        if known != checkpoint.digest:
            raise UserError(
                f"{checkpoint.path}: its digest is {checkpoint.digest}, but {known} is registered for that step as "
                f"scheduler.trajectory; name the trajectory that is registered, or import this one"
            )
        recorded = self._digests.setdefault(checkpoint.step, checkpoint.digest)
        if recorded != checkpoint.digest:
            raise UserError(
                f"{checkpoint.path}: its digest is {checkpoint.digest}, but this run was taught by {recorded} at that step; "
                f"restore the checkpoint, or start a run of another name"
            )
        twins = [step for step, digest in self._digests.items() if digest == recorded and step != checkpoint.step]
        if twins and self._writes:
            # Published trajectories have branches that serve the final weights, which undoes the method without an error.
            log.warning(
                "%s: the same weights as at the teacher's step %d; is the trajectory what it says?", checkpoint.path, twins[0]
            )
        if self._writes:
            write_atomic(self._path, json.dumps({"rotations": self._rotations, "digests": self._digests}, indent=1))


def _shown(rotation: Sequence[int] | None) -> str:
    return "no rotation" if rotation is None else f"teacher step {rotation[1]} from student step {rotation[0]}"
