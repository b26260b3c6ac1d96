"""What the service's clients read of its answers, each held to its shape.

Whatever answers at scheduler.url may be another service, a proxy, or a newer megapd: fields that are not known are left out, and
what lacks a known one counts as no answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from megapd.config import ScheduleConfig
from megapd.schedule.plan import Decision
from megapd.scheduler.client.http import Api, Away

T = TypeVar("T")


@dataclass(frozen=True)
class RunAnswer:
    schedule_version: int
    decisions: int


@dataclass(frozen=True)
class _ChangeAnswer:
    """applied: student step from which on the run says that it follows it, None: it has not said so, of a decision: or from
    `effective` on. path: below the run's."""

    effective: int
    applied: int | None

    @property
    def begin(self) -> int:
        return self.effective if self.applied is None else self.applied


@dataclass(frozen=True)
class VersionAnswer(_ChangeAnswer):
    version: int
    document: dict[str, Any]

    def __str__(self) -> str:
        return f"version {self.version}"

    @property
    def path(self) -> str:
        return f"schedules/{self.version}"


@dataclass(frozen=True)
class DecisionAnswer(_ChangeAnswer, Decision):
    @property
    def path(self) -> str:
        return f"decisions/{self.sequence}"

    def taken(self, begin: int) -> Decision:
        """As the run records it, which begins it at student step `begin`."""
        return Decision(self.sequence, self.step, begin, self.checkpoint, self.reason, self.evidence)


@dataclass(frozen=True)
class ReportedAnswer:
    decision: DecisionAnswer | None


@dataclass(frozen=True)
class CheckpointAnswer:
    step: int
    weights: str


@dataclass(frozen=True)
class LeaseAnswer:
    lease_seconds: Annotated[float, Field(gt=0.0, lt=1e6)]


@dataclass(frozen=True)
class AssignmentAnswer:
    endpoints: list[Any]  # one that is no address must not keep students from the others


@dataclass(frozen=True)
class ReplicaAnswer:
    endpoint: Any
    group: str
    state: str


RUN, VERSION, REPORTED = TypeAdapter(RunAnswer), TypeAdapter(VersionAnswer), TypeAdapter(ReportedAnswer)
VERSIONS, DECISIONS = TypeAdapter(list[VersionAnswer]), TypeAdapter(list[DecisionAnswer])
CHECKPOINTS = TypeAdapter(list[CheckpointAnswer])
LEASE, ASSIGNMENT, REPLICAS = TypeAdapter(LeaseAnswer), TypeAdapter(AssignmentAnswer), TypeAdapter(list[ReplicaAnswer])
ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)
LIST: TypeAdapter[list[Any]] = TypeAdapter(list[Any])
SCHEDULE: TypeAdapter[ScheduleConfig] = TypeAdapter(ScheduleConfig)  # a version's document


def ask(api: Api, kind: TypeAdapter[T], method: str, path: str, body: Any = None) -> T:
    """Raises Refusal, or Away, also where the answer is none of a scheduler."""
    answer = api.ask(method, path, body)
    try:
        return kind.validate_python(answer)
    except ValidationError as error:
        raise _strange(api, method, path) from error


def pages(api: Api, kind: TypeAdapter[list[T]], path: str, key: str, after: int) -> list[T]:
    """All that come after `after`, by their field `key`. Raises as `ask` does."""
    try:
        return kind.validate_python(api.pages(path, key, after))
    except (ValidationError, TypeError, LookupError) as error:
        raise _strange(api, "GET", path) from error


def _strange(api: Api, method: str, path: str) -> Away:
    return Away(f"scheduler.url: {api.url} answers {method} {path} as no scheduler does; is it one?")
