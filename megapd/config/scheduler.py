"""Section `scheduler`: what the service listens on and keeps, and where its clients find it."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from megapd.config.base import Section


class SchedulerConfig(Section):
    """The checkpoint scheduler, both ends: `megapd scheduler` reads the first part, runs and replicas url and token."""

    database: str = Field(
        "sqlite:///scheduler.db",
        description="where the store is: sqlite:///FILE (not on a network file system), or postgresql://USER@HOST/NAME",
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

    @field_validator("database")
    @classmethod
    def _known_database(cls, url: str) -> str:
        if not re.match(r"sqlite:///.+|postgresql(\+psycopg)?://", url):
            raise ValueError("give sqlite:///FILE or postgresql://USER@HOST/NAME")
        return url

    @field_validator("url")
    @classmethod
    def _known_url(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[^/\s]+/?", url):
            raise ValueError("give http://HOST:PORT or https://HOST:PORT")
        return url

    @model_validator(mode="after")
    def _tls(self) -> SchedulerConfig:
        if (self.certificate is None) != (self.key is None):
            missing = "certificate" if self.certificate is None else "key"
            raise ValueError(f"{missing}: certificate and key go together; give both, or neither")
        return self
