"""Alembic's entry point: runs the migrations on the engine that `storage.database` passes in."""

from typing import Any, Final

from alembic import context
from sqlalchemy import Connection, Engine, text

from deltadock.storage.tables import TableRow

LOCK_KEY: Final = 0x64656C7461  # "delta"


def serialise(connection: Connection) -> None:
    """Let one process migrate at a time, with timeouts so that no busy table is blocked for long.

    SQLite needs neither: its transactions take the write lock when they begin.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})
        connection.execute(text("SET LOCAL lock_timeout = '10s'"))
        connection.execute(text("SET LOCAL statement_timeout = '300s'"))


def check_references(driver: Any) -> None:
    """Raise RuntimeError if rows of a SQLite database refer to others that are missing."""
    if missing := driver.execute("PRAGMA foreign_key_check").fetchmany(5):
        raise RuntimeError(f"Rows refer to others that a revision dropped: {missing}")


def run(engine: Engine) -> None:
    """Apply the pending revisions in one transaction."""
    with engine.connect() as connection:
        on_sqlite = connection.dialect.name == "sqlite"
        driver = connection.connection.driver_connection
        assert driver is not None
        if on_sqlite:
            # SQLite changes a constraint by copying its table; dropping the old one would delete
            # the rows that refer to it. The pragma takes effect only outside a transaction.
            driver.execute("PRAGMA foreign_keys = OFF")
        try:
            with connection.begin():
                serialise(connection)
                context.configure(
                    connection=connection,
                    target_metadata=TableRow.metadata,
                    render_as_batch=on_sqlite,
                )
                context.run_migrations()
                if on_sqlite:
                    check_references(driver)
        finally:
            if on_sqlite:
                driver.execute("PRAGMA foreign_keys = ON")


run(context.config.attributes["engine"])
