"""Alembic runs this: the migrations on the connection, and in the transaction, that megapd.schedule.store hands over."""

from alembic import context

from megapd.schedule.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
