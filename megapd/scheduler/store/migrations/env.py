"""Alembic runs this: the migrations on the connection, and in the transaction, that the store hands over."""

from alembic import context

from megapd.scheduler.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
