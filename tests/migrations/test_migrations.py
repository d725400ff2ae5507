"""The migrations create exactly the models' tables, on both databases."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import MetaData, inspect, select

from deltadock.storage.database import Database, alembic_config, make_engine, migrate
from deltadock.storage.repositories import UploadRepository
from deltadock.storage.tables import DeltaRow, TableRow, UploadKind
from deltadock.storage.tenancy import LOCAL_TENANT


@pytest.fixture(params=["sqlite", "postgres"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'new folder' / 'deltadock.db'}"
    url: str = request.getfixturevalue("postgres_database")
    return url


def test_models_and_migrations_agree(empty_url: str) -> None:
    migrate(empty_url)
    engine = make_engine(empty_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, TableRow.metadata) == []
    engine.dispose()


def test_a_missing_column_is_detected(empty_url: str) -> None:
    migrate(empty_url)
    engine = make_engine(empty_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs DROP COLUMN message")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert [step[0] for step in compare_metadata(context, TableRow.metadata)] == ["add_column"]
    engine.dispose()


def test_migrating_twice_keeps_data(empty_url: str) -> None:
    migrate(empty_url)
    database = Database(empty_url)
    with database.session_scope() as session:
        upload_id = UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT).id
    migrate(empty_url)
    with database.read_scope() as session:
        assert UploadRepository(session, LOCAL_TENANT).find(upload_id) is not None
    database.dispose()


def test_concurrent_migrations_are_serialized(empty_url: str) -> None:
    code = "import sys; from deltadock.storage.database import migrate; migrate(sys.argv[1])"
    processes = [subprocess.Popen([sys.executable, "-c", code, empty_url]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    engine = make_engine(empty_url)
    assert set(TableRow.metadata.tables) < set(inspect(engine).get_table_names())
    engine.dispose()


def test_options_of_old_deltas_are_migrated_both_ways(empty_url: str) -> None:
    engine = make_engine(empty_url)
    Path(engine.url.database or "").parent.mkdir(parents=True, exist_ok=True)
    config = alembic_config(engine)
    command.upgrade(config, "0001")
    old = {
        "dlt_text": (1.5, {"seed": 3, "solver": "scip", "calibration": "a" * 64}),
        "dlt_exact": (None, {"seed": 0, "solver": "exact", "calibration": None}),
    }
    with engine.begin() as connection:
        tables = MetaData()
        tables.reflect(connection)
        stamp = datetime.now(UTC).replace(tzinfo=None)
        connection.execute(
            tables.tables["checkpoints"].insert(),
            {"digest": "c", "weights_digest": "w", "model_type": "m", "total_bytes": 1,
             "created_at": stamp},
        )  # fmt: skip
        connection.execute(
            tables.tables["bases"].insert(),
            {"id": "b", "name": "b", "checkpoint_digest": "c", "created_at": stamp},
        )
        for delta_id, (bits, options) in old.items():
            connection.execute(
                tables.tables["deltas"].insert(),
                {"id": delta_id, "name": delta_id, "version": 1, "base_id": "b",
                 "checkpoint_digest": "c", "method": "m", "bits": bits, "options": options,
                 "fingerprint": "f", "created_at": stamp},
            )  # fmt: skip
    command.upgrade(config, "head")
    database = Database(empty_url)
    with database.read_scope() as session:
        migrated = {delta.id: delta.options for delta in session.scalars(select(DeltaRow))}
    database.dispose()
    assert migrated["dlt_text"] == {
        "seed": 3,
        "solver": "scip",
        "goal": {"kind": "bits", "value": 1.5},
        "calibration": {
            "sources": [{"digest": "a" * 64, "weight": 1.0}],
            "tokens": 262_144,
            "length": 2048,
        },
    }
    assert migrated["dlt_exact"] == old["dlt_exact"][1] | {"goal": None}
    command.downgrade(config, "0001")
    with engine.connect() as connection:
        rows = connection.execute(select(tables.tables["deltas"]))
        assert {row.id: (row.bits, row.options) for row in rows} == old
    engine.dispose()


def test_downgrading_to_base_drops_all_tables(empty_url: str) -> None:
    migrate(empty_url)
    engine = make_engine(empty_url)
    command.downgrade(alembic_config(engine), "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    engine.dispose()
