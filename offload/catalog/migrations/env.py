"""Run by Alembic with the connection that `offload.catalog.schema` opened, in its transaction."""

from __future__ import annotations

from alembic import context

from offload.catalog.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite's DDL is transactional once the driver's own BEGIN is off, as it is here; what needs
    # ALTER TABLE there is copied into a new table.
    transactional_ddl=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
