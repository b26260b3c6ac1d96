"""Sections `teacher` and `loss`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megapd.config.base import Section
from megapd.config.scheduler import SchedulerConfig
from megapd.registry import signal_kinds

SIGNALS = ("auto", "dense", "hidden", "topk", "sampled", "argmax")  # megapd's kinds register where torch is imported


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
        if (self.certificate is None) != (self.key is None):
            missing = "certificate" if self.certificate is None else "key"
            raise ValueError(f"{missing}: certificate and key go together; give both, or neither")
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
        None, ge=1, description="checkpoints held at once, so that students steps apart do not swap them; default 1, served 2"
    )
    carrier: Literal["colocated", "served", "shared_memory", "cached"] = "colocated"
    cache: Path | None = Field(None, description="folder of recorded signals: read first, and what it lacks is added")
    endpoints: tuple[str, ...] = Field(
        (), description="grpc://HOST:PORT or grpc+tls://HOST:PORT of the replicas; none: those that hold a lease at scheduler.url"
    )
    token: Path | None = Field(None, description="file with the bearer token that server and clients share")
    root_certificate: Path | None = Field(None, description="PEM of the authority that signed the server's certificate")
    certificate: Path | None = Field(None, description="PEM of the client's certificate (mutual TLS)")
    key: Path | None = Field(None, description="PEM of its private key")
    depth: int = Field(2, ge=1, description="steps whose signals are asked for ahead")
    call_seconds: float = Field(60.0, gt=0.0, description="longest wait for one answer before another replica is asked")
    deadline_seconds: float = Field(
        300.0, gt=0.0, le=540.0, description="longest wait for a signal before on_failure; below the process group's 600"
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
            if not re.fullmatch(r"grpc(\+tls)?://[^/:]+:\d+", endpoint):
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
        if (self.certificate is None) != (self.key is None):
            missing = "certificate" if self.certificate is None else "key"
            raise ValueError(f"{missing}: certificate and key go together; give both, or neither")
        return self

    def check_found(self, scheduler: SchedulerConfig) -> None:
        """ValueError if nothing says where a served teacher's replicas are."""
        if self.carrier in ("served", "shared_memory") and not self.endpoints and scheduler.url is None:
            raise ValueError(
                f"teacher.endpoints: carrier {self.carrier} needs the address of a teacher, grpc://HOST:PORT, or "
                f"scheduler.url, where teachers hold their leases"
            )

    def check_loss(self, loss: LossConfig) -> None:
        """ValueError if the loss cannot be computed from the signal that was asked for."""
        if self.signal == "argmax" and (loss.teacher_temperature > 0 or loss.divergence == "reverse_kl"):
            raise ValueError("teacher.signal: argmax is exact at loss.teacher_temperature 0 alone; set that, or choose auto")
        if self.signal in ("topk", "sampled") and loss.teacher_temperature == 0:
            raise ValueError("teacher.signal: at loss.teacher_temperature 0 the argmax is all there is; choose auto")
        if self.signal == "sampled" and loss.divergence not in ("forward_kl", "soft_cross_entropy"):
            raise ValueError(f"teacher.signal: sampled is unbiased for forward_kl, not {loss.divergence}; choose topk")


Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tvd", "soft_cross_entropy"]


class LossConfig(Section):
    """alpha * CE(labels) + (1 - alpha) * divergence(teacher, student) + z_loss * (log normaliser)^2, averaged over the labelled
    positions; see megapd_kernels.LossOptions."""

    divergence: Divergence = "forward_kl"
    teacher_temperature: float = Field(1.0, ge=0.0, description="0: the teacher's argmax, exactly")
    student_temperature: float = Field(1.0, gt=0.0)
    alpha: float = Field(0.0, ge=0.0, le=1.0, description="weight of the labels' cross entropy")
    beta: float = Field(0.5, gt=0.0, lt=1.0, description="the teacher's share in the mixture of the JSD")
    scale_t2: bool = Field(False, description="multiply the divergence by student_temperature ** 2")
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="share of the uniform distribution in the labels")
    z_loss: float = Field(0.0, ge=0.0, description="weight of the squared log of the softmax's normaliser; 1e-4 is usual")
    common_vocabulary: bool = Field(
        False, description="teacher and student of different vocabulary sizes: learn over the classes that both have"
    )
    recompute: bool = Field(False, description="form the logits again in backward instead of holding the head's gradient")
    chunk_bytes: int | None = Field(
        None,
        ge=1 << 10,
        description="most bytes of logits alive at once in the fused loss; none: 64 MiB on a CPU, 2 GiB on a GPU",
    )

    @model_validator(mode="after")
    def _finite(self) -> LossConfig:
        if self.divergence == "reverse_kl" and self.teacher_temperature == 0.0:
            raise ValueError("reverse_kl is infinite against an argmax teacher: raise teacher_temperature above 0")
        return self
