"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"


down_revision = None


branch_labels = None


depends_on = None


_SERIAL = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "tokens",
        sa.Column("hash", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(120), nullable=False, unique=True),
        sa.Column("role", sa.String(8), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_table(
        "trajectories",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("run", sa.String(120), nullable=False),
        sa.Column("location", sa.Text, nullable=False),
        sa.Column("vocabulary", sa.String(128), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_table(
        "checkpoints",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("trajectory", sa.String(64), sa.ForeignKey("trajectories.digest"), nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("weights", sa.String(64), nullable=False),
        sa.Column("record", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.UniqueConstraint("trajectory", "step"),
    )
    op.create_table(
        "flags",
        sa.Column("checkpoint", sa.String(64), sa.ForeignKey("checkpoints.digest"), primary_key=True),
        sa.Column("kind", sa.String(16), primary_key=True),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("found", sa.Float, nullable=False),
        sa.Column("accepted_by", sa.String(120)),
    )
    op.create_table(
        "names",
        sa.Column("name", sa.String(120), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
    )
    op.create_table(
        "runs",
        sa.Column("name", sa.String(120), primary_key=True),
        sa.Column("trajectory", sa.String(64), sa.ForeignKey("trajectories.digest")),
        sa.Column("group", sa.String(120), nullable=False),
        sa.Column("steps", sa.BigInteger, nullable=False),
        sa.Column("facts", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("schedule_version", sa.Integer, nullable=False),
        sa.Column("decisions", sa.Integer, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("reported", sa.Float),
        sa.Column("assignment_version", sa.Integer, nullable=False),
        sa.Column("endpoints", sa.Text, nullable=False),
    )
    op.create_index("ix_runs_group", "runs", ["group"])
    op.create_table(
        "schedules",
        sa.Column("run", sa.String(120), sa.ForeignKey("runs.name"), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("document", sa.Text, nullable=False),
        sa.Column("effective", sa.BigInteger, nullable=False),
        sa.Column("applied", sa.BigInteger),
        sa.Column("author", sa.String(120), nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_table(
        "decisions",
        sa.Column("run", sa.String(120), sa.ForeignKey("runs.name"), primary_key=True),
        sa.Column("sequence", sa.Integer, primary_key=True),
        sa.Column("checkpoint", sa.BigInteger, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.String(120), nullable=False),
        sa.Column("effective", sa.BigInteger, nullable=False),
        sa.Column("applied", sa.BigInteger),
        sa.Column("evidence", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_table(
        "reports",
        sa.Column("run", sa.String(120), sa.ForeignKey("runs.name"), primary_key=True),
        sa.Column("step", sa.BigInteger, primary_key=True),
        sa.Column("metrics", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_table(
        "replicas",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("group", sa.String(120), nullable=False),
        sa.Column("endpoint", sa.String(300), nullable=False),
        sa.Column("facts", sa.Text, nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
        sa.Column("reason", sa.String(20), nullable=False),
        sa.Column("registered", sa.Float, nullable=False),
    )
    op.create_index("ix_replicas_state", "replicas", ["state"])
    op.create_index("ix_replicas_endpoint", "replicas", ["endpoint"])
    op.create_table(
        "events",
        sa.Column("id", _SERIAL, primary_key=True, autoincrement=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("run", sa.String(120)),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_created", "events", ["created"])
