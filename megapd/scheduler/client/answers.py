"""What a run reads of the service's answers, each held to its shape, and of its own metrics.jsonl.

Whatever answers at scheduler.url may be another service, a proxy, or a newer megapd: fields that are not known are left out, and
what lacks a known one counts as no answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from megapd.scheduler.client.http import Api, Away

PAGE = 1000


T = TypeVar("T")


@dataclass(frozen=True)
class RunAnswer:
    schedule_version: int
    decisions: int


@dataclass(frozen=True)
class VersionAnswer:
    version: int
    effective: int
    applied: int | None
    document: dict[str, Any]


@dataclass(frozen=True)
class DecisionAnswer:
    sequence: int
    step: int
    effective: int
    checkpoint: int
    reason: str
    evidence: dict[str, Any]
    applied: int | None


@dataclass(frozen=True)
class ReportedAnswer:
    decision: DecisionAnswer | None


@dataclass(frozen=True)
class CheckpointAnswer:
    step: int
    weights: str


RUN, VERSION, REPORTED = TypeAdapter(RunAnswer), TypeAdapter(VersionAnswer), TypeAdapter(ReportedAnswer)


VERSIONS, DECISIONS = TypeAdapter(list[VersionAnswer]), TypeAdapter(list[DecisionAnswer])


CHECKPOINTS = TypeAdapter(list[CheckpointAnswer])


ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)


LIST: TypeAdapter[list[Any]] = TypeAdapter(list[Any])


def ask(api: Api, kind: TypeAdapter[T], method: str, path: str, body: Any = None) -> T:
    """Raises Refusal, or Away, also where the answer is none of a scheduler."""
    answer = api.ask(method, path, body)
    try:
        return kind.validate_python(answer)
    except ValidationError as error:
        raise Away(f"scheduler.url: {api.url} answers {method} {path} as no scheduler does; is it one?") from error


def pages(api: Api, kind: TypeAdapter[list[T]], path: str, key: str, after: int) -> list[T]:
    """All that come after `after`, by their field `key`."""
    found: list[T] = []
    while True:
        last = getattr(found[-1], key) if found else after
        page = ask(api, kind, "GET", f"{path}?after={last}&limit={PAGE}")
        found += page
        if len(page) < PAGE:
            return found


def recorded(metrics: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl up to the first that a crash has damaged."""
    for text in metrics.read_text(errors="replace").split("\n") if metrics.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            return
        if not isinstance(line, dict) or not {"kind", "step"} <= line.keys():
            return
        yield line
