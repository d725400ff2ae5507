"""Column types, and the clock that leases are compared with."""

from datetime import UTC, datetime

from sqlalchemy import DateTime, Dialect, TypeDecorator, select, text
from sqlalchemy.orm import Session


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime on every database (SQLite has no time zones of its own)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Normalise to UTC; SQLite stores the naive form, which sorts like the instant."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("A datetime without a time zone cannot be stored.")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give the zone back."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def database_now(session: Session) -> datetime:
    """The time on the database's clock, the one clock that all workers share.

    `clock_timestamp()`, since Postgres's `now()` stands still within a transaction. SQLite runs
    on this machine, so its clock is ours.
    """
    if session.get_bind().dialect.name == "postgresql":
        moment: datetime = session.execute(select(text("clock_timestamp()"))).scalar_one()
        return moment.astimezone(UTC)
    return datetime.now(UTC)
