"""An upgrade without a stop: the release before goes on working on this version's schema.

Its statements are made from its schema, the one at revision `BEFORE`: it inserts all columns that
it knows and no others, and so do its updates.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    DateTime,
    Double,
    Engine,
    Enum,
    Float,
    MetaData,
    Numeric,
    Table,
    insert,
    select,
    update,
)
from sqlalchemy.orm import Session
from sqlalchemy.types import Integer

from deltadock.storage.database import make_engine, migrate
from deltadock.storage.tables import TableRow

BEFORE: Final = "0011"
"""Of the last release: raise it with each one. Until there is one, a revision that stands for it.
Migrations after it may only add (CONTRIBUTING.md, "Change the schema")."""


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'deltadock.db'}"
    url: str = request.getfixturevalue("postgres_database")
    return url


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = make_engine(url)
    yield engine
    engine.dispose()


def test_the_release_before_writes_and_reads_this_schema(url: str, engine: Engine) -> None:
    migrate(url, BEFORE)
    before = MetaData()
    before.reflect(engine)
    tables = [table for table in before.sorted_tables if table.name != "alembic_version"]
    fill(engine, tables, 1)
    migrate(url)
    engine.dispose()  # the connections' prepared statements are of the schema before
    fill(engine, tables, 2)
    with engine.begin() as connection:
        for table in tables:
            rows = connection.execute(select(table)).mappings().all()
            assert len(rows) >= 2, table.name
            keys = [column.name for column in table.primary_key.columns]
            for row in rows:
                same = [table.c[key] == row[key] for key in keys]
                others = {name: value for name, value in row.items() if name not in keys}
                if others:
                    assert connection.execute(update(table).where(*same).values(others)).rowcount

    with Session(engine) as session:  # and this version reads what it wrote
        for mapper in TableRow.registry.mappers:
            if mapper.local_table in TableRow.metadata.tables.values():
                session.scalars(select(mapper.class_)).all()


def fill(engine: Engine, tables: list[Table], number: int) -> None:
    """Insert a row into each table, that refers to the other ones."""
    made: dict[str, dict[str, Any]] = {}
    with engine.begin() as connection:
        for table in tables:
            row = {}
            for column in table.columns:
                keys = [key for key in column.foreign_keys if key.column.table.name in made]
                if keys:
                    target = keys[0].column
                    row[column.name] = made[target.table.name][target.name]
                elif column.foreign_keys:
                    row[column.name] = None  # of the same table
                else:
                    row[column.name] = sample(table, column, number)
            connection.execute(insert(table), row)
            made[table.name] = row


def sample(table: Table, column: Column[Any], number: int) -> Any:
    """A value for the column; `number` makes it another one."""
    known = TableRow.metadata.tables[table.name].columns.get(column.name)
    if known is not None and isinstance(known.type, Enum):
        return next(iter(known.type.enum_class or ())).value
    match column.type:
        case Boolean():
            return False
        case DateTime():
            moment = datetime(2026, 11, number, tzinfo=UTC)
            return moment if column.type.timezone else moment.replace(tzinfo=None)
        case JSON():
            return {}
        case Integer() | Float() | Double() | Numeric():
            return number
    return f"{column.name}-{number}"[: getattr(column.type, "length", None)]
