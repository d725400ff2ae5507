"""Alembic's entry point: runs the migrations on the engine that `storage.database` passes in."""

from typing import Final

from alembic import context
from sqlalchemy import Connection, Engine, text

from deltadock.storage.models import TableRow

LOCK_KEY: Final = 0x64656C7461  # "delta"


def serialise(connection: Connection) -> None:
    """Let one process migrate at a time, with timeouts so that no busy table is blocked for long.

    SQLite needs neither: its transactions take the write lock when they begin.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})
        connection.execute(text("SET LOCAL lock_timeout = '10s'"))
        connection.execute(text("SET LOCAL statement_timeout = '300s'"))


def run(engine: Engine) -> None:
    """Apply the pending revisions in one transaction."""
    with engine.begin() as connection:
        serialise(connection)
        context.configure(
            connection=connection,
            target_metadata=TableRow.metadata,
            render_as_batch=connection.dialect.name == "sqlite",
        )
        context.run_migrations()


run(context.config.attributes["engine"])
