"""An empty, migrated database of each kind per test; migrations run once per session."""

from collections.abc import Iterator

import pytest
from sqlalchemy import delete, update

from deltadock.storage.database import Database, migrate
from deltadock.storage.tables import AuditRow, TableRow, TenantRow
from deltadock.storage.tenancy import LOCAL_TENANT


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
def migrated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Database]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('database') / 'test.db'}"
    else:
        url = request.getfixturevalue("postgres_url")
    migrate(url)
    database = Database(url)
    yield database
    database.dispose()


@pytest.fixture
def database(migrated: Database) -> Iterator[Database]:
    yield migrated
    with migrated.session_scope() as session:
        for table in reversed(TableRow.metadata.sorted_tables):
            if table.name not in {TenantRow.__tablename__, AuditRow.__tablename__}:
                session.execute(delete(table))
        session.execute(delete(TenantRow).where(TenantRow.id != LOCAL_TENANT))
        session.execute(update(TenantRow).values(served_at=None))
