"""The audit log's rows are written with their change, and stay."""

import pytest
from sqlalchemy import delete, select, text, update
from sqlalchemy.exc import DBAPIError

from deltadock.storage.actor import Actor, acting
from deltadock.storage.database import Database
from deltadock.storage.repositories import AuditRepository, UploadRepository
from deltadock.storage.tables import AuditAction, AuditOrigin, AuditRow, UploadKind
from deltadock.storage.tenancy import LOCAL_TENANT

ALICE = Actor(AuditOrigin.REQUEST, LOCAL_TENANT, "key_alice", "request-1")


def add_upload(database: Database) -> str:
    with acting(ALICE), database.session_scope() as session:
        return UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT).id


def test_a_change_and_its_record_are_one_transaction(database: Database) -> None:
    upload_id = add_upload(database)
    with database.session_scope() as session:
        UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT)
        session.rollback()
    with database.read_scope() as session:
        row = AuditRepository(session, LOCAL_TENANT).page(limit=1)[0]
    assert (row.action, row.object_id, row.outcome) == (
        AuditAction.UPLOAD_CREATE,
        upload_id,
        "done",
    )
    assert (row.by_tenant_id, row.by_key_id, row.request_id) == ALICE[1:]


def test_the_database_refuses_to_change_records(database: Database) -> None:
    add_upload(database)
    statements = [update(AuditRow).values(by_key_id="key_bob"), delete(AuditRow)]
    if database.engine.dialect.name == "postgresql":
        statements.append(text("TRUNCATE audit_log"))
    else:
        replace = "INSERT OR REPLACE INTO audit_log SELECT * FROM audit_log LIMIT 1"
        statements.append(text(replace))
    for statement in statements:
        with (
            pytest.raises(DBAPIError, match="append-only"),
            database.engine.begin() as connection,
        ):
            connection.execute(statement)
    with database.read_scope() as session:
        assert "key_alice" in set(session.scalars(select(AuditRow.by_key_id)))
