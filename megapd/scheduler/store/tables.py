"""Tables of the store, in SQLAlchemy's terms: a new store gets these, migrations/ bring an older one to them.

Times are seconds since 1970 (float), trees are canonical JSON as text (`canonical`), digests hexadecimal sha256. Text is never
bytes that a database could refuse: JSON is ASCII, and names follow NAME.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sqlalchemy import BigInteger, Column, Float, ForeignKey, Index, Integer, MetaData, String, Table, Text, UniqueConstraint

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,119}$"  # of runs, names and replicas' groups; a digest is none: 64 hexadecimal digits
DIGEST = r"^[0-9a-f]{64}$"

# AUTOINCREMENT, and so no number twice, only for SQLite's own INTEGER PRIMARY KEY.
_Serial = BigInteger().with_variant(Integer(), "sqlite")
metadata = MetaData()

tokens = Table(
    "tokens",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("name", String(120), nullable=False, unique=True),
    Column("role", String(8), nullable=False),
    Column("created", Float, nullable=False),
)

trajectories = Table(
    "trajectories",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("run", String(120), nullable=False),
    Column("location", Text, nullable=False),
    Column("vocabulary", String(128), nullable=False),
    Column("created", Float, nullable=False),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("trajectory", String(64), ForeignKey("trajectories.digest"), nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("weights", String(64), nullable=False),
    Column("record", Text, nullable=False),
    Column("created", Float, nullable=False),
    UniqueConstraint("trajectory", "step"),
)

flags = Table(
    "flags",
    metadata,
    Column("checkpoint", String(64), ForeignKey("checkpoints.digest"), primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("detail", Text, nullable=False),
    Column("found", Float, nullable=False),
    Column("accepted_by", String(120)),
)

names = Table(
    "names",
    metadata,
    Column("name", String(120), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("version", Integer, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("name", String(120), primary_key=True),
    Column("trajectory", String(64), ForeignKey("trajectories.digest")),
    Column("group", String(120), nullable=False),
    Column("steps", BigInteger, nullable=False),
    Column("facts", Text, nullable=False),
    Column("created", Float, nullable=False),
    # The present state as direct values, so that looking it up costs the same however long the history is.
    Column("schedule_version", Integer, nullable=False),
    Column("decisions", Integer, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("reported", Float),
    Column("assignment_version", Integer, nullable=False),
    Column("endpoints", Text, nullable=False),
    Index("ix_runs_group", "group"),
)

schedules = Table(
    "schedules",
    metadata,
    Column("run", String(120), ForeignKey("runs.name"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("document", Text, nullable=False),
    Column("effective", BigInteger, nullable=False),
    Column("applied", BigInteger),
    Column("author", String(120), nullable=False),
    Column("note", Text, nullable=False),
    Column("created", Float, nullable=False),
)

decisions = Table(
    "decisions",
    metadata,
    Column("run", String(120), ForeignKey("runs.name"), primary_key=True),
    Column("sequence", Integer, primary_key=True),
    Column("checkpoint", BigInteger, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("reason", String(120), nullable=False),
    Column("effective", BigInteger, nullable=False),
    Column("applied", BigInteger),
    Column("evidence", Text, nullable=False),
    Column("created", Float, nullable=False),
)

reports = Table(
    "reports",
    metadata,
    Column("run", String(120), ForeignKey("runs.name"), primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("metrics", Text, nullable=False),
    Column("created", Float, nullable=False),
)

replicas = Table(
    "replicas",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("group", String(120), nullable=False),
    Column("endpoint", String(300), nullable=False),
    Column("facts", Text, nullable=False),
    Column("state", String(10), nullable=False),  # live, draining, gone
    Column("reason", String(20), nullable=False),  # of gone: expired, left, replaced
    Column("registered", Float, nullable=False),
    Index("ix_replicas_state", "state"),
    Index("ix_replicas_endpoint", "endpoint"),
)

events = Table(
    "events",
    metadata,
    Column("id", _Serial, primary_key=True, autoincrement=True),
    Column("kind", String(32), nullable=False),
    Column("run", String(120)),
    Column("body", Text, nullable=False),
    Column("created", Float, nullable=False),
    Index("ix_events_created", "created"),
    sqlite_autoincrement=True,
)


def canonical(tree: Any) -> str:
    """JSON with sorted keys, without spaces, in ASCII; ValueError for numbers that are not finite."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(tree: Any) -> str:
    """sha256 of the canonical JSON, hexadecimal: the address of an immutable record."""
    return hashlib.sha256(canonical(tree).encode()).hexdigest()
