"""Engines, sessions and migrations, the same on SQLite and Postgres.

The unit of work is the caller's: `with database.session_scope() as session:` commits once, at
its end; repositories never do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.orm import Session

from deltadock.errors import InvalidInput, Unavailable

if TYPE_CHECKING:
    from alembic.config import Config

BUSY_TIMEOUT_SECONDS: Final = 30
READ_ONLY: Final = "deltadock_read_only"
"""Execution option of connections that will not write."""


class Database:
    """One process's connection pool. Connects at first use, not at construction."""

    def __init__(self, url: str) -> None:
        self.engine = make_engine(url)
        self._reading = self.engine.execution_options(
            **{READ_ONLY: True, "postgresql_readonly": True}
        )

    @contextmanager
    def session_scope(self) -> Iterator[Session]:
        """A session that commits when the block ends, and rolls back if it raises.

        Raises:
            Unavailable: the database does not answer.
            InvalidInput: it cannot hold a value, such as a NUL character.
        """
        with _domain_errors(), Session(self.engine, expire_on_commit=False) as session:
            yield session
            session.commit()

    @contextmanager
    def read_scope(self) -> Iterator[Session]:
        """A session that only reads; on SQLite it never waits for a writer.

        Raises:
            Unavailable: the database does not answer.
            InvalidInput: it cannot hold a value, such as a NUL character.
        """
        with _domain_errors(), Session(self._reading, expire_on_commit=False) as session:
            yield session

    def dispose(self) -> None:
        """Close every pooled connection."""
        self.engine.dispose()


def make_engine(url: str) -> Engine:
    """An engine for a SQLite or Postgres URL; `postgresql://` means psycopg 3."""
    target = normalise_url(url)
    if target.get_backend_name() != "sqlite":
        return create_engine(
            target,
            pool_size=20,
            max_overflow=20,
            pool_pre_ping=True,
            connect_args={"connect_timeout": 5},
        )
    engine = create_engine(target, connect_args={"timeout": BUSY_TIMEOUT_SECONDS})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def normalise_url(url: str) -> URL:
    """The URL with Postgres's driver named."""
    target = make_url(url)
    if target.drivername in {"postgresql", "postgres"}:
        return target.set(drivername="postgresql+psycopg")
    return target


def migrate(url: str, revision: str = "head") -> str | None:
    """Bring the database at `url` to `revision`, creating a SQLite file's folder if need be.

    Returns the revision that it is at now; None if that is before the first one.
    Safe to call from several processes at once: they take turns.
    """
    from alembic import command  # only whoever migrates waits for its import
    from alembic.migration import MigrationContext

    target = normalise_url(url)
    if target.get_backend_name() == "sqlite" and target.database:
        Path(target.database).parent.mkdir(parents=True, exist_ok=True)
    engine = make_engine(url)
    try:
        command.upgrade(alembic_config(engine), revision)
        with engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()
    finally:
        engine.dispose()


def alembic_config(engine: Engine) -> "Config":
    """Alembic's configuration for the packaged migrations, run on `engine`."""
    from alembic.config import Config

    config = Config(attributes={"engine": engine})
    config.set_main_option("script_location", str(files("deltadock.migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


@contextmanager
def _domain_errors() -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        raise Unavailable("The database does not answer; try again shortly.") from error
    except DataError as error:
        raise InvalidInput(
            "The database cannot hold or look for one of the values, perhaps for a NUL character "
            "or a number out of range. Send another."
        ) from error


def _configure_sqlite(connection: Any, _record: object) -> None:
    # The driver's own, implicit BEGIN would start every transaction as a reader.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # an acknowledged commit survives a power cut
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A writer that began as a reader fails at once, busy timeout or not, when another has
    # written meanwhile; so writers take the write lock first and wait for it.
    read_only = connection.get_execution_options().get(READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
