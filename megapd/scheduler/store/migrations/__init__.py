"""The store's migrations, for alembic."""
