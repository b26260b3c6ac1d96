"""What every trajectory does, wherever its checkpoints are: list them, name the nearest, wait for one still to be written."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence

from megapd.errors import RunFailed
from megapd.trajectory.format import Checkpoint


class CheckpointTimeout(RunFailed, TimeoutError):
    """A checkpoint that a teacher was to write did not appear in time."""


class Listing(ABC):
    """`steps` and `incomplete` are what was there at construction or at the last `refresh`."""

    def __init__(self) -> None:
        self._steps: tuple[int, ...] = ()
        self._incomplete: tuple[int, ...] = ()

    @property
    def steps(self) -> tuple[int, ...]:
        """Teacher steps of the complete checkpoints, increasing."""
        return self._steps

    @property
    def incomplete(self) -> tuple[int, ...]:
        """Steps of which there is something, but no whole checkpoint: a copy that stopped midway, or a file that was lost."""
        return self._incomplete

    @abstractmethod
    def refresh(self) -> tuple[int, ...]:
        """Look again which checkpoints there are; returns `steps`."""

    @abstractmethod
    def checkpoint(self, step: int) -> Checkpoint:
        """Everything but the weights; UserError if it is not there (the nearest are listed) or damaged."""

    @abstractmethod
    def written(self, step: int) -> bool:
        """Whether the checkpoint of `step` is there now, whole."""

    def wait_for(self, step: int, timeout_seconds: float, poll_seconds: float = 0.2) -> Checkpoint:
        """The checkpoint of `step` as soon as it is whole; CheckpointTimeout if it is not after `timeout_seconds`."""
        wait_until(
            lambda: self.written(step),
            timeout_seconds,
            poll_seconds,
            lambda: self._late(f"no checkpoint of step {step} after {timeout_seconds:g} s"),
        )
        return self.checkpoint(step)

    @abstractmethod
    def _late(self, what: str) -> str:
        """The message of a CheckpointTimeout: where, `what`, and what to do."""

    def _list(self, found: Iterable[int]) -> None:
        """Divide the steps of which there is something, increasing, into those that are whole and the others."""
        whole = {step: self.written(step) for step in found}
        self._steps = tuple(step for step, complete in whole.items() if complete)
        self._incomplete = tuple(step for step, complete in whole.items() if not complete)

    def _nearest(self, step: int) -> str:
        """What there is around `step`, looked up again."""
        nearest = nearest_steps(self.refresh(), step)
        return f"the nearest are {', '.join(map(str, nearest))}" if nearest else "there are none"

    def _newest(self) -> str:
        steps = self.refresh()
        return f"the newest there is of step {steps[-1]}" if steps else "there is none yet"


def wait_until(there: Callable[[], bool], timeout_seconds: float, poll_seconds: float, late: Callable[[], str]) -> None:
    """Return once `there()`, looked at every `poll_seconds`; after `timeout_seconds` CheckpointTimeout, saying `late()`."""
    deadline = time.monotonic() + timeout_seconds
    while not there():
        left = deadline - time.monotonic()
        if left <= 0:
            raise CheckpointTimeout(late())
        time.sleep(min(poll_seconds, left))


def equal_weights(where: object, same: Mapping[str, Sequence[int]]) -> list[str]:
    """Problems, one line each, from digest -> steps: weights that several steps have."""
    return [
        f"{where}: steps {', '.join(map(str, steps))} have the same weights, digest {digest[:12]}"
        for digest, steps in same.items()
        if len(steps) > 1
    ]


def nearest_steps(steps: tuple[int, ...], step: int, count: int = 4) -> tuple[int, ...]:
    """Up to `count` of the increasing `steps` around `step`, increasing."""
    place = bisect_left(steps, step)
    around = steps[max(0, place - count) : place + count]
    return tuple(sorted(sorted(around, key=lambda s: (abs(s - step), s))[:count]))
