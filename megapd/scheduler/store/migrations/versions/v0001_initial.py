"""The first version. A new store is made of tables.py, whatever the version; this is what the next ones follow."""

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Nothing is older."""
