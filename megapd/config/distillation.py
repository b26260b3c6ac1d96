"""Sections `scheduler`, `teacher`, `schedule` and `loss`: who teaches, from where and when, and what the student makes of it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from megapd.config.base import DatabaseURL, OpenSection, Section, check_key, check_token_file
from megapd.registry import Registry, policies, signal_kinds

SIGNALS = ("auto", "dense", "hidden", "topk", "sampled", "argmax")  # megapd's kinds register where torch is imported


class SchedulerConfig(Section):
    """The checkpoint scheduler, both ends: `megapd scheduler` reads the first part, runs and replicas url and token."""

    database: DatabaseURL = Field(
        DatabaseURL("sqlite:///scheduler.db"), description="sqlite:///FILE, on a local disk; or postgresql://USER@HOST/NAME"
    )
    host: str = Field("127.0.0.1", description="address to listen on; other than loopback needs tokens and TLS")
    port: int = Field(8480, ge=0, lt=1 << 16, description="0: any free one")
    certificate: Path | None = Field(None, description="PEM of the service's TLS certificate; with it, key is needed")
    key: Path | None = Field(None, description="PEM of its private key")
    lease_seconds: float = Field(15.0, ge=0.5, le=3600.0, description="a replica that is silent this long is dropped")
    retention_days: float = Field(30.0, gt=0.0, description="events and gone replicas are kept this long; decisions for ever")
    max_body_bytes: int = Field(1 << 20, ge=1 << 10, description="longer requests are refused with 413")
    streams: int = Field(64, ge=1, description="event streams open at once; more are refused with 429")
    url: str | None = Field(None, description="for clients: https://HOST:PORT of the service; none: the embedded schedule")
    token: Path | None = Field(None, description="for clients: file that holds what `megapd scheduler token` printed")
    trajectory: str | None = Field(None, description="for runs: name or digest of the registered trajectory that teaches")
    group: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,119}$",
        description="for runs and replicas: replicas teach the runs of their group; default: the configuration's name",
    )
    root_certificate: Path | None = Field(None, description="for clients: PEM of the authority that signed the certificate")
    insecure: bool = Field(False, description="let tokens cross a network in the clear, to http:// on another host")

    @field_validator("database")
    @classmethod
    def _known_database(cls, url: DatabaseURL) -> DatabaseURL:
        if not re.match(r"sqlite:///.+|postgresql(\+psycopg)?://", url.get_secret_value()):
            raise ValueError("give sqlite:///FILE or postgresql://USER@HOST/NAME")
        return url

    @field_validator("url")
    @classmethod
    def _known_url(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[^/\s@\\]+/?", url):
            raise ValueError("give http://HOST:PORT or https://HOST:PORT")
        return url

    @model_validator(mode="after")
    def _tls(self) -> SchedulerConfig:
        check_token_file("token", self.token)
        check_key(self.certificate, self.key)
        return self


class TeacherServerConfig(Section):
    """What `megapd teacher` listens on and how it answers."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all, which needs teacher.token")
    advertise: str | None = Field(
        None, pattern=r"^[A-Za-z0-9._:-]{1,250}$", description="host that students reach it by, for scheduler.url; default: host"
    )
    port: int = Field(8470, ge=0, lt=1 << 16, description="replica i listens on port + i; 0: any free one")
    metrics_port: int | None = Field(None, ge=0, lt=1 << 16, description="HTTP /metrics and /health, replica i on + i; none: off")
    replicas: int = Field(1, ge=1, description="independent copies of the teacher that one command starts")
    ranks: int = Field(1, ge=1, description="processes that share one replica's weights, see teacher.sharding")
    token_budget: int = Field(1 << 16, ge=1, description="small requests are answered together, up to this many tokens")
    queue: int = Field(64, ge=1, description="requests that wait at most; more are told to come again")
    certificate: Path | None = Field(None, description="PEM of the server's TLS certificate; with it, key is needed")
    key: Path | None = Field(None, description="PEM of its private key")
    client_authority: Path | None = Field(None, description="PEM; clients must show a certificate that it signed (mutual TLS)")
    drain_seconds: float = Field(25.0, gt=0.0, description="after SIGTERM, longest time for requests that are already here")

    @model_validator(mode="after")
    def _tls(self) -> TeacherServerConfig:
        check_key(self.certificate, self.key)
        if self.client_authority is not None and self.certificate is None:
            raise ValueError("client_authority: clients' certificates are checked over TLS alone; set certificate and key")
        return self


class TeacherConfig(Section):
    """The trajectory that teaches, how its signals are made and what carries them."""

    trajectory: str | None = Field(
        None,
        description="folder of a teacher run's trajectory, runs/NAME/trajectory; or a Hugging Face model, as a folder or "
        "hf:REPO[@REVISION], with {step} or {kstep} where the step stands; none: what the endpoints serve",
    )
    steps: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="steps of a trajectory that is written with {step}")
    same_vocabulary: bool = Field(False, description="trust that the teacher's ids mean what the task's do, if nothing proves it")
    signal: str = Field("auto", description="dense, hidden, topk, sampled, argmax or a registered kind; auto: cheapest exact")
    k: int | None = Field(None, ge=1, description="classes of topk, default 64; draws of sampled, default 12")
    encoding: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field("auto", description="auto: the teacher's precision")
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(None, description="of the teacher; default: training.precision")
    sharding: Literal["whole", "zero", "tensor"] = Field("whole", description="how ranks hold it: all of it each, ZeRO-3, tensor")
    resident: int | None = Field(
        None, ge=1, description="checkpoints held at once, for students steps apart; default 1, served 2"
    )
    carrier: Literal["colocated", "served", "shared_memory", "cached"] = Field(
        "colocated", description="how signals come: from the student's process, by network, by memory of the host, from disk"
    )
    cache: Path | None = Field(None, description="folder of recorded signals: read first, and what it lacks is added")
    endpoints: tuple[str, ...] = Field(
        (), description="replicas' grpc[+tls]://HOST:PORT; none: those with a lease at scheduler.url"
    )
    token: Path | None = Field(None, description="file with the bearer token that server and clients share")
    root_certificate: Path | None = Field(None, description="PEM of the authority that signed the server's certificate")
    certificate: Path | None = Field(None, description="PEM of the client's certificate (mutual TLS)")
    key: Path | None = Field(None, description="PEM of its private key")
    insecure: bool = Field(False, description="let the token cross a network in the clear, by grpc:// between two hosts")
    depth: int = Field(2, ge=1, description="steps whose signals are asked for ahead")
    call_seconds: float = Field(60.0, gt=0.0, description="longest wait for one answer before another replica is asked")
    deadline_seconds: float = Field(
        300.0, gt=0.0, le=540.0, description="longest wait for a signal; below the process group's 600"
    )
    on_failure: Literal["wait", "cache", "labels"] = Field(
        "wait", description="at the deadline: stop the run; or read the cache, used for this alone; or learn from the labels"
    )
    server: TeacherServerConfig = TeacherServerConfig()

    @field_validator("signal")
    @classmethod
    def _kind(cls, signal: str) -> str:
        kinds = list(dict.fromkeys([*SIGNALS, *signal_kinds.names()]))
        if signal not in kinds:
            raise ValueError(f"Input should be {', '.join(map(repr, kinds[:-1]))} or {kinds[-1]!r}")
        return signal

    @model_validator(mode="after")
    def _possible(self) -> TeacherConfig:
        remote = self.carrier in ("served", "shared_memory")
        if self.trajectory is None and not remote:
            raise ValueError(f"trajectory: carrier {self.carrier} needs the folder of a teacher run, runs/NAME/trajectory")
        for endpoint in self.endpoints:
            if not re.fullmatch(r"grpc(\+tls)?://([^/:@\\\[\]\s]+|\[[0-9A-Fa-f:.]+\]):\d+", endpoint):
                raise ValueError(f"endpoints: {endpoint!r} is not grpc://HOST:PORT or grpc+tls://HOST:PORT")
        if self.carrier == "cached" and self.cache is None:
            raise ValueError("cache: carrier cached needs the folder that `megapd record` wrote")
        if self.on_failure == "cache" and (self.cache is None or self.carrier == "cached"):
            raise ValueError("on_failure: cache needs teacher.cache, and a carrier that can fail; set both, or choose wait")
        if self.on_failure == "labels" and not remote:
            raise ValueError(f"on_failure: labels is for a served teacher; carrier {self.carrier} cannot be lost, choose wait")
        if self.k is not None and self.signal in ("auto", "dense", "hidden", "argmax"):
            raise ValueError(f"k: has no meaning for signal {self.signal}; choose topk or sampled")
        if self.encoding == "int8" and self.signal in ("dense", "topk", "sampled", "argmax"):
            raise ValueError(f"encoding: int8 is for hidden states, not for signal {self.signal}; choose fp16")
        check_token_file("token", self.token)
        check_key(self.certificate, self.key)
        return self

    def check_found(self, scheduler: SchedulerConfig) -> None:
        """ValueError if nothing says where a served teacher's replicas are."""
        if self.carrier in ("served", "shared_memory") and not self.endpoints and scheduler.url is None:
            needs = "the address of a teacher, grpc://HOST:PORT, or scheduler.url, where teachers hold their leases"
            raise ValueError(f"teacher.endpoints: carrier {self.carrier} needs {needs}")

    def check_loss(self, loss: LossConfig) -> None:
        """ValueError if the loss cannot be computed from the signal that was asked for."""
        if self.signal == "argmax" and (loss.teacher_temperature > 0 or loss.divergence == "reverse_kl"):
            raise ValueError("teacher.signal: argmax is exact at loss.teacher_temperature 0 alone; set that, or choose auto")
        if self.signal in ("topk", "sampled") and loss.teacher_temperature == 0:
            raise ValueError("teacher.signal: at loss.teacher_temperature 0 the argmax is all there is; choose auto")
        if self.signal == "sampled" and loss.divergence not in ("forward_kl", "soft_cross_entropy"):
            raise ValueError(f"teacher.signal: sampled is unbiased for forward_kl, not {loss.divergence}; choose topk")


class ScheduleConfig(OpenSection):
    """Which of the teacher's checkpoints teaches when.

    `builder(section, there, steps)` resolves it over the teacher steps `there`, increasing, for a run of `steps` student steps:
    pieces [(student step, teacher step), ..], the first at 0, increasing, all below `steps`; and warnings, one line each. It is
    pure, and raises UserError naming the setting. What else megapd has to know, a policy says itself:

    needs_metrics   it is built from the checkpoints' metrics too: builder(section, there, steps, {teacher step: metrics})
    """

    registry: ClassVar[Registry[type[Any]]] = policies
    tag: ClassVar[str] = "policy"
    needs_metrics: ClassVar[bool] = False

    policy: str

    @property
    def waits(self) -> float | None:
        """Seconds to wait for a checkpoint that the teacher has yet to write; None: all must be there when the run starts."""
        return None

    @property
    def grows(self) -> AdaptiveConfig | None:
        """How decisions extend it as the student learns; None: it is resolved when the run starts."""
        return None


@policies.register("one_shot")
class OneShotConfig(ScheduleConfig):
    """One checkpoint for the whole run; by default the last of the trajectory."""

    builder = "megapd.schedule.policies:one_shot"

    policy: Literal["one_shot"] = "one_shot"
    checkpoint: int | None = Field(None, ge=0, description="step of the teacher's checkpoint")


@policies.register("equal")
class EqualConfig(ScheduleConfig):
    """(N, T)-progressive: N equally spaced checkpoints, T student steps each, then the last one."""

    builder = "megapd.schedule.policies:equal"

    policy: Literal["equal"] = "equal"
    checkpoints: int = Field(ge=1, description="N")
    steps: int = Field(ge=1, description="T, student steps a checkpoint")


@policies.register("matched")
class MatchedConfig(ScheduleConfig):
    """Student step s in [iR, (i+1)R) is taught by the teacher's step max(1, i + 1 - lag) * R * speed, capped at the last."""

    builder = "megapd.schedule.policies:matched"

    policy: Literal["matched"] = "matched"
    refresh: int = Field(ge=1, description="R, student steps between rotations")
    speed: float = Field(1.0, gt=0.0, description="teacher steps a student step")
    lag: int = Field(0, ge=0, description="intervals that the teacher's checkpoint is behind the student's; 1: one it has passed")


class RangeConfig(Section):
    """From student step `start` on, the checkpoint of the teacher's step `checkpoint` teaches."""

    start: int = Field(ge=0, description="student step from which the checkpoint teaches")
    checkpoint: int = Field(ge=0, description="step of the teacher's checkpoint")


@policies.register("explicit")
class ExplicitConfig(ScheduleConfig):
    """A list of ranges; the first starts at 0, each lasts until the next starts."""

    builder = "megapd.schedule.policies:explicit"

    policy: Literal["explicit"] = "explicit"
    ranges: tuple[RangeConfig, ...] = Field(min_length=1)

    @field_validator("ranges")
    @classmethod
    def _ordered(cls, ranges: tuple[RangeConfig, ...]) -> tuple[RangeConfig, ...]:
        starts = [r.start for r in ranges]
        if starts[0] != 0:
            raise ValueError(f"the first range must start at 0, not {starts[0]}")
        if any(b <= a for a, b in itertools.pairwise(starts)):
            raise ValueError(f"the starts must increase, got {starts}")
        return ranges


@policies.register("follow")
class FollowConfig(ScheduleConfig):
    """Teacher and student train together: R steps a checkpoint as in `matched`, waiting for each to be written."""

    builder = "megapd.schedule.policies:follow"

    policy: Literal["follow"] = "follow"
    refresh: int = Field(ge=1, description="R, student steps between rotations")
    speed: float = Field(1.0, gt=0.0, description="teacher steps a student step")
    lag: int = Field(0, ge=0, description="intervals that the teacher's checkpoint is behind the student's; 1: one it has passed")
    last: int = Field(ge=1, description="the last step of the teacher run, whose checkpoint ends the trajectory")
    timeout_seconds: float = Field(3600.0, gt=0.0, description="longest wait for one checkpoint")

    @property
    def waits(self) -> float:
        return self.timeout_seconds


@policies.register("geometric")
class GeometricConfig(ScheduleConfig):
    """N checkpoints at geometrically growing teacher steps, from `first` to the last one, each for an equal part of the run."""

    builder = "megapd.schedule.policies:geometric"

    policy: Literal["geometric"] = "geometric"
    checkpoints: int = Field(ge=1, description="N")
    first: int | None = Field(None, ge=1, description="the first one's step; default: the trajectory's first after step 0")
    steps: int | None = Field(None, ge=1, description="T, student steps a checkpoint")
    total: int | None = Field(None, ge=1, description="student steps that the N checkpoints share equally, instead of `steps`")

    @model_validator(mode="after")
    def _one_length(self) -> GeometricConfig:
        if (self.steps is None) == (self.total is None):
            raise ValueError("steps: give either steps, of each checkpoint, or total, of all together")
        if self.total is not None and self.total < self.checkpoints:
            raise ValueError(f"total: {self.total} student steps are too few for {self.checkpoints} checkpoints; raise it")
        return self


@policies.register("transition")
class TransitionConfig(ScheduleConfig):
    """(N, T)-progressive around the teacher's phase transition: N - 1 checkpoints from inside it, T student steps each, then the
    last one."""

    builder = "megapd.schedule.policies:transition"
    needs_metrics = True

    policy: Literal["transition"] = "transition"
    steps: int = Field(ge=1, description="T, student steps a checkpoint")
    checkpoints: int = Field(2, ge=2, description="N, the last checkpoint included")
    metric: Literal["auto", "loss", "support", "degree_1", "m_robust_3"] = Field(
        "auto",
        description="what shows the transition; auto: a curriculum metric where `megapd analyse` measured one, else the loss",
    )


@policies.register("adaptive")
class AdaptiveConfig(ScheduleConfig):
    """Go on to the next of N checkpoints when the student's accuracy or divergence no longer improves."""

    builder = "megapd.schedule.policies:adaptive"

    policy: Literal["adaptive"] = "adaptive"
    checkpoints: int | None = Field(None, ge=1, description="N, chosen by `spacing`")
    spacing: Literal["equal", "geometric"] = Field("equal", description="of the chosen checkpoints' steps")
    teachers: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="the checkpoints' steps, instead of `checkpoints`")
    metric: Literal["accuracy", "divergence"] = Field("accuracy", description="held out; or of the training steps reported")
    window: int = Field(5, ge=1, description="reports whose mean the next one is compared with")
    gain: float = Field(0.01, ge=0.0, description="a report that improves on that mean by less is saturated")
    patience: int = Field(1, ge=1, description="saturated reports in a row that advance")
    progress: float = Field(0.01, ge=0.0, description="improvement since the last advance that the next one needs; 0: none")
    min_dwell: int = Field(1, ge=1, description="student steps that each checkpoint teaches at least")
    max_dwell: int | None = Field(None, ge=1, description="student steps after which the next one follows in any case")
    lead: int = Field(10, ge=1, description="student steps between a decision and its effect")

    @model_validator(mode="after")
    def _consistent(self) -> AdaptiveConfig:
        if (self.checkpoints is None) == (not self.teachers):
            raise ValueError("checkpoints: give either checkpoints, a number, or teachers, a list of steps")
        if any(b <= a for a, b in itertools.pairwise(self.teachers)):
            raise ValueError(f"teachers: the steps must increase, got {list(self.teachers)}")
        if self.max_dwell is not None and self.max_dwell < self.min_dwell:
            raise ValueError(f"max_dwell: {self.max_dwell} is below min_dwell {self.min_dwell}; raise it")
        return self

    @property
    def grows(self) -> AdaptiveConfig:
        return self


class LossConfig(Section):
    """alpha * CE(labels) + (1 - alpha) * divergence(teacher, student) + z_loss * (log normaliser)^2, averaged over the labelled
    positions; see megapd_kernels.LossOptions."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "tvd", "soft_cross_entropy"] = Field(
        "forward_kl", description="between the teacher's distribution and the student's"
    )
    teacher_temperature: float = Field(1.0, ge=0.0, description="0: the teacher's argmax, exactly")
    student_temperature: float = Field(1.0, gt=0.0, description="of the student's softmax in the divergence")
    alpha: float = Field(0.0, ge=0.0, le=1.0, description="weight of the labels' cross entropy")
    beta: float = Field(0.5, gt=0.0, lt=1.0, description="the teacher's share in the mixture of the JSD")
    scale_t2: bool = Field(False, description="multiply the divergence by student_temperature ** 2")
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="share of the uniform distribution in the labels")
    z_loss: float = Field(0.0, ge=0.0, description="weight of the squared log of the softmax's normaliser; 1e-4 is usual")
    common_vocabulary: bool = Field(False, description="of vocabularies of two sizes, learn over the classes that both have")
    recompute: bool = Field(False, description="form the logits again in backward instead of holding the head's gradient")
    chunk_bytes: int | None = Field(None, ge=1 << 10, description="most bytes of logits at once; none: 64 MiB, on a GPU 2 GiB")

    @model_validator(mode="after")
    def _finite(self) -> LossConfig:
        if self.divergence == "reverse_kl" and self.teacher_temperature == 0.0:
            raise ValueError("reverse_kl is infinite against an argmax teacher: raise teacher_temperature above 0")
        return self
