"""Bodies of the service's requests and answers. What the store or a JSON encoder could refuse is refused here, with 422."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Path, Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from megapd.scheduler.store import DIGEST, NAME, canonical

STEPS = 1 << 50  # more than any run has, and exact in every JSON reader
DEPTH = 20  # of trees: what reads them again must not run out of stack
_PRINTABLE = r"^[^\x00-\x1f\x7f]*$"


def _plain(tree: Any) -> Any:
    level = [tree]
    for _ in range(DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
        ]
    if level:
        raise ValueError(f"nested more than {DEPTH} deep")
    canonical(tree)  # ValueError: numbers that are not finite
    return tree


Name = Annotated[str, Field(pattern=NAME)]
Digest = Annotated[str, Field(pattern=DIGEST)]
Step = Annotated[int, Field(ge=0, lt=STEPS)]
StepKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,14})$")]
Count = Annotated[int, Field(ge=0, lt=1 << 31)]
Vocabulary = Annotated[str, Field(max_length=128, pattern=r"^[\w:-]*$")]
Line = Annotated[str, Field(max_length=1000, pattern=_PRINTABLE)]
Place = Annotated[Line, Field(min_length=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Metrics = Annotated[dict[Annotated[str, Field(pattern=r"^[\w./-]{1,80}$")], Number], Field(max_length=200)]
Tree = Annotated[dict[str, Any], AfterValidator(_plain)]
NamePath = Annotated[str, Path(pattern=NAME)]
DigestPath = Annotated[str, Path(pattern=DIGEST)]
Limit = Annotated[int, Query(ge=1, le=1000)]
AfterNumber = Annotated[int, Query(ge=-1, lt=STEPS)]
AfterName = Annotated[str, Query(max_length=120, pattern=r"^[A-Za-z0-9._-]*$")]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Problem(Body):
    """Of every answer from 400 on. detail: which field, what is wrong and the fix; current: what is there instead (409)."""

    detail: str
    current: Any = None


# -------------------------------------------------------------------------------------------------------------- requests


class NewTrajectory(Body):
    run: Name
    location: Place = Field(description="folder, or hf: with a pattern, as its run's machines see it; never opened here")
    vocabulary: Vocabulary = Field("", description="digest of what the token ids mean; empty: unknown")
    name: Name | None = Field(None, description="also point this name to it")


class StoredFile(Body):
    sha256: Digest
    bytes: Step


class NewCheckpoint(Body):
    step: Step
    location: Place
    weights: Digest = Field(description="digest of the weights, which every signal names")
    head: Digest | None = Field(None, description="sha256 of the head's weight; none: not known")
    tokenizer: Vocabulary = ""
    files: dict[Annotated[str, Field(max_length=300, pattern=r"^[^\x00-\x1f\x7f]+$")], StoredFile] = Field(max_length=5000)
    metrics: Tree = Field(default_factory=dict)
    probe_loss: Number | None = Field(None, description="on a sample that is the same for the whole trajectory")


class Findings(Body):
    """What `megapd trajectory verify` found: all of it; earlier flags that are not among it are removed."""

    flags: dict[StepKey, dict[Literal["changed", "duplicate", "order", "loss"], Line]] = Field(
        max_length=10_000, description="teacher step -> kind -> detail"
    )


class NewName(Body):
    digest: Digest
    expected: Count | None = Field(None, description="the version that it is at, 0: there is none; not given: whatever it is")


class NewRun(Body):
    trajectory: Name | Digest | None = Field(None, description="name or digest")
    group: Name | None = Field(None, description="whose replicas teach it; default: the run's own name")
    steps: Annotated[int, Field(ge=1, lt=STEPS)]
    facts: Tree = Field(default_factory=dict)


class NewSchedule(Body):
    expected: Count = Field(description="the version that it replaces, 0: there is none")
    effective: Step | None = Field(None, description="the student step that it begins at; none: the next, of the first 0")
    document: Tree = Field(description="as the section schedule of a configuration")
    note: Line = ""
    accept: bool = Field(False, description="though it names flagged checkpoints")


class Control(Body):
    action: Literal["pause", "advance", "pin", "resume"]
    expected: Count
    effective: Step
    checkpoint: Step | None = None
    accept: bool = False


class Applied(Body):
    step: Step


class NewDecision(Body):
    sequence: Count = Field(description="0 for the first")
    step: Step = Field(description="student steps done at the report that it rests on")
    effective: Step = Field(description="the student step that it begins at")
    checkpoint: Step = Field(description="the teacher's step")
    reason: Annotated[str, Field(max_length=120, pattern=_PRINTABLE)]
    evidence: Tree


class Report(Body):
    step: Step
    now: Step | None = Field(None, description="student steps done when this is sent, where that is later")
    metrics: Metrics


class NewReplica(Body):
    group: Name
    endpoint: Annotated[str, Field(max_length=300, pattern=r"^grpc(\+tls)?://[A-Za-z0-9._\[\]:-]+:[0-9]{1,5}$")]
    facts: Tree = Field(default_factory=dict)


class Beat(Body):
    figures: Metrics = Field(default_factory=dict, description="e.g. tokens_per_second, queued; shown, not kept")


class NewToken(Body):
    name: Name
    role: Literal["read", "run", "admin"]


# ----------------------------------------------------------------------- answers, as the OpenAPI document describes them


class TrajectoryAnswer(BaseModel):
    digest: str
    run: str
    location: str
    vocabulary: str
    created: float


class FlagAnswer(BaseModel):
    kind: str
    detail: str
    found: float
    accepted_by: str | None


class CheckpointAnswer(BaseModel):
    digest: str
    trajectory: str
    step: int
    location: str
    weights: str
    head: str | None
    tokenizer: str
    files: dict[str, StoredFile]
    bytes: int
    metrics: dict[str, Any]
    probe_loss: float | None
    created: float
    flags: list[FlagAnswer]


class NameAnswer(BaseModel):
    name: str
    digest: str
    version: int


class RunAnswer(BaseModel):
    name: str
    trajectory: str | None
    group: str
    steps: int
    facts: dict[str, Any]
    created: float
    schedule_version: int
    decisions: int
    step: int = Field(description="the last that was reported, -1: none")
    reported: float | None
    assignment_version: int
    endpoints: list[str]


class ScheduleAnswer(BaseModel):
    run: str
    version: int
    document: dict[str, Any]
    effective: int
    applied: int | None
    author: str
    note: str
    created: float


class DecisionAnswer(BaseModel):
    sequence: int
    step: int
    effective: int
    checkpoint: int
    reason: str
    evidence: dict[str, Any]
    applied: int | None = Field(None, description="the student step that it began at, where the run learned of it too late")


class ReportedAnswer(BaseModel):
    new: bool
    decision: DecisionAnswer | None


class ReportAnswer(BaseModel):
    step: int
    metrics: dict[str, float]
    created: float


class AssignmentAnswer(BaseModel):
    version: int
    endpoints: list[str]


class LeaseAnswer(BaseModel):
    id: str
    group: str
    endpoint: str
    state: Literal["live", "draining"]
    age: float = Field(description="seconds since the last beat")
    figures: dict[str, float]
    lease_seconds: float


class BeatAnswer(BaseModel):
    state: Literal["live", "draining"]
    lease_seconds: float


class EventAnswer(BaseModel):
    id: int
    kind: str
    run: str | None
    body: dict[str, Any]
    created: float


class TokenAnswer(BaseModel):
    name: str
    role: str
    created: float


class SecretAnswer(BaseModel):
    name: str
    role: str
    token: str = Field(description="told this once")


class HealthAnswer(BaseModel):
    status: Literal["ok"]
    version: str
