"""What a run's schedule resolved to, kept in the run's folder: a resumed run is taught as the first start decided."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megapd.errors import UserError
from megapd.files import check_run, sealed, unsealed, write_atomic
from megapd.schedule.plan import Plan
from megapd.trajectory import Checkpoint

FILE = "schedule.json"  # in the run's folder
log = logging.getLogger(__name__)


class ScheduleRecord:
    """Rotations and the digests of the checkpoints that taught, in schedule.json.

    A trajectory that grew or changed since the run began must not change what a resumed run learns.
    """

    def __init__(
        self, path: Path, plan: Plan, *, run: str, resumed: bool, writes: bool, registered: Mapping[int, str] | None = None
    ) -> None:
        """run: its id. registered: teacher step -> digest that the scheduler has of it, as far as it has one. Raises
        UserError if a resumed run's schedule no longer resolves to what was recorded."""
        self._path, self._run, self._writes, self._registered = path, run, writes, registered or {}
        self._digests: dict[int, str] = {}
        rotations = [list(rotation) for rotation in plan.fixed()]
        if resumed and path.exists():
            recorded = _read(path, run)
            self._digests = recorded["digests"]
            # More training.steps may bring rotations, but none before the end of the run as it was.
            known = [rotation for rotation in rotations if rotation[0] < recorded.get("steps", plan.steps)]
            if recorded["rotations"] != known:
                pairs = zip_longest(known, recorded["rotations"])
                now, before = next((_shown(a), _shown(b)) for a, b in pairs if a != b)
                raise UserError(
                    f"schedule: it resolves to {now} now, but this run began with {before} ({path}); the trajectory has changed: "
                    f"restore it, or name its checkpoints with schedule.policy explicit"
                )
        self._rotations, self._steps = rotations, plan.steps

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
            tree = {"run": self._run, "steps": self._steps, "rotations": self._rotations, "digests": self._digests}
            write_atomic(self._path, sealed(tree))


def _read(path: Path, run: str) -> dict[str, Any]:
    """UserError for a damaged record, or another run's."""
    try:
        tree = unsealed(path.read_text())
        digests = {int(step): str(digest) for step, digest in tree["digests"].items()}
        rotations = [[int(n) for n in rotation] for rotation in tree["rotations"]]
        found: dict[str, Any] = {"rotations": rotations, "digests": digests}
        if "steps" in tree:
            found["steps"] = int(tree["steps"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); restore it from a copy, or start a run of another name") from error
    check_run(path, tree.get("run"), run)
    return found


def _shown(rotation: Sequence[int] | None) -> str:
    return "no rotation" if rotation is None else f"teacher step {rotation[1]} from student step {rotation[0]}"
