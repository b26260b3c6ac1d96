"""CachedStream: signals read from the disk cache, and from another stream what it lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from megapd.batch import Batch
from megapd.errors import SignalNotFinite, UserError
from megapd.schedule.plan import Plan
from megapd.signals import Head, Signal, SignalSpec, not_finite
from megapd.teacher.cache.cache import SignalCache
from megapd.teacher.stream import Stream
from megapd.trajectory import Checkpoint, Checkpoints


class CachedStream:
    """A stream that reads the cache, and asks its source for what the cache lacks.

    A micro-batch comes from the cache if all its samples are there, else from the source; what was missing is added, and of
    samples that were there the cache's rows are used, so that a run that records and its replay are bitwise the same. Closing it
    closes the source and the cache.
    """

    def __init__(
        self,
        cache: SignalCache,
        plan: Plan,
        spec: SignalSpec,
        trajectory: Checkpoints,
        source: Stream | None = None,
        *,
        classes: int = 0,
        agree: Callable[[list[bool]], list[bool]] | None = None,
    ) -> None:
        """classes: of the teacher's head, needed with a source. agree: where ranks answer each other's batches, as those of a
        sharded teacher in the students' processes do: given which micro-batches of a step this rank would ask the source for,
        those that any rank would, a collective that `signals` calls once."""
        assert source is None or classes > 0
        self.spec = spec
        self._cache, self._plan, self._trajectory, self._source = cache, plan, trajectory, source
        self._classes, self._agree = classes, agree
        self._checkpoints: dict[int, Checkpoint] = {}
        # What `request` found: the batches' digests and their signals, None where the source was asked; or why it could not look.
        self._ahead: dict[int, tuple[list[str], list[Signal | None] | Exception]] = {}
        self._head: tuple[str, torch.device, Head] | None = None

    @property
    def counts(self) -> dict[str, int]:
        """hits, misses, recorded, damaged of the cache."""
        return self._cache.counts

    def ready(self, step: int) -> bool:
        return self._trajectory.written(self._plan.checkpoint_at(step)) if self._source is None else self._source.ready(step)

    def teacher(self, step: int) -> Checkpoint:
        """Read from the trajectory: a source whose signals are all in the cache loads no checkpoint."""
        teacher_step = self._plan.checkpoint_at(step)
        if teacher_step not in self._checkpoints:
            self._checkpoints[teacher_step] = self._trajectory.checkpoint(teacher_step)
        return self._checkpoints[teacher_step]

    def request(self, step: int, batches: Sequence[Batch]) -> None:
        """Looks the step up on the caller's thread, which reads its rows from the disk ahead of the step; what is not there is
        asked of the source."""
        found: list[Signal | None] | Exception = [None] * len(batches)
        # A checkpoint that a teacher has yet to write has given no signals.
        if self._trajectory.written(self._plan.checkpoint_at(step)):
            try:
                found = self._lookup(self.teacher(step), batches)
            except Exception as error:  # whatever it is, `signals` raises it
                found = error
        self._ahead[step] = [batch.digest for batch in batches], found
        if self._source is not None and not isinstance(found, Exception):
            missing = [batch for batch, signal in zip(batches, found, strict=True) if signal is None]
            if missing:
                self._source.request(step, missing)

    def signals(self, step: int, batches: Sequence[Batch]) -> Iterator[Signal]:
        """Raises UserError for samples that are not in the cache if there is no source."""
        checkpoint = self.teacher(step)
        found = self._found(step, checkpoint, batches)
        asked = [signal is None for signal in found]
        if self._agree is not None:
            asked = self._agree(asked)
        missing = [batch for batch, ask in zip(batches, asked, strict=True) if ask]
        given: Iterator[Signal] = iter(())
        if missing:
            if self._source is None:
                raise self._missing(step, checkpoint, batches, missing)
            given = iter(self._source.signals(step, missing))
        return self._answers(step, checkpoint, zip(batches, found, asked, strict=True), given)

    def close(self) -> None:
        try:
            if self._source is not None:
                self._source.close()
        finally:
            self._cache.close()

    def _lookup(self, checkpoint: Checkpoint, batches: Sequence[Batch]) -> list[Signal | None]:
        return [self._cache.lookup(checkpoint.digest, self.spec, batch) for batch in batches]

    def _found(self, step: int, checkpoint: Checkpoint, batches: Sequence[Batch]) -> list[Signal | None]:
        """What `request` found for these batches, or raises what it met; looked up now if it was not called for them."""
        for earlier in [key for key in list(self._ahead) if key < step]:  # a list: `request` adds from its own thread
            del self._ahead[earlier]
        digests, found = self._ahead.pop(step, ([], []))
        if isinstance(found, Exception):
            raise found
        return found if digests == [batch.digest for batch in batches] else self._lookup(checkpoint, batches)

    def _answers(
        self, step: int, checkpoint: Checkpoint, found: Iterable[tuple[Batch, Signal | None, bool]], given: Iterator[Signal]
    ) -> Iterator[Signal]:
        for batch, cached, ask in found:
            fresh = next(given) if ask else None  # taken, and not used, where another rank alone lacked it
            if cached is not None:
                signal = cached.to(batch.ids.device)
            else:
                assert fresh is not None
                fresh.check(checkpoint.digest, batch)
                if not fresh.finite():  # recording waits for the device anyway
                    raise SignalNotFinite(f"step {step}: {not_finite(checkpoint.step)}")
                signal = self._cache.record(fresh, batch, self._classes)
            signal.check(checkpoint.digest, batch)
            yield self._with_head(signal, batch.ids.device)

    def _with_head(self, signal: Signal, device: torch.device) -> Signal:
        """With the one head of its teacher, which moves to the device once: the recorded one, if there is one."""
        if signal.head is None:
            return signal
        if self._head is None or self._head[:2] != (signal.teacher, device):
            head = self._cache.head(signal.teacher, self.spec) or signal.head
            self._head = (signal.teacher, device, head.to(device))
        return replace(signal, head=self._head[2])

    def _missing(self, step: int, checkpoint: Checkpoint, batches: Sequence[Batch], missing: Sequence[Batch]) -> UserError:
        lacking = sum(int((~self._cache.present(checkpoint.digest, self.spec, batch)).sum()) for batch in missing)
        samples = sum(batch.samples for batch in batches)
        others = [held for held in self._cache.holdings(checkpoint.digest) if held != self.spec.parameters]
        there = f" (for that teacher it holds {', '.join(others)})" if others else ""
        what = f"{lacking} of the {samples} samples" if lacking else "the teacher's head for the samples"
        return UserError(
            f"teacher.cache: {self._cache.folder} lacks {what} of step {step}, teacher step {checkpoint.step}, "
            f"{self.spec.parameters}{there}; run `megapd record CONFIG`, or choose a teacher.carrier other than cached"
        )
