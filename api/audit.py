"""The audit log: who changed what, when, and with which outcome."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Final, Self

from fastapi import Query
from pydantic import BaseModel, Field

from deltadock.api.access import CallerDep
from deltadock.api.dependencies import ReadSession
from deltadock.api.keys import EXAMPLE_KEY_ID, EXAMPLE_TENANT_ID, OfTenant, named_tenant
from deltadock.api.paging import After, Cursor, Limit
from deltadock.api.routing import api_router
from deltadock.api.schemas import EXAMPLE_DELTA_ID, EXAMPLE_TIME
from deltadock.errors import Forbidden, InvalidInput, NotFound
from deltadock.problems import problems
from deltadock.storage.repositories import AuditRepository, KeyRepository
from deltadock.storage.tables import AuditAction, AuditOrigin, AuditRow

router = api_router("/v1/audit", tags=["audit"])


class AuditRecord(BaseModel):
    """One change."""

    id: int = Field(description="Ascending.", examples=[1042])
    at: datetime = Field(examples=[EXAMPLE_TIME])
    tenant: str = Field(description="The object's tenant.", examples=[EXAMPLE_TENANT_ID])
    origin: AuditOrigin = Field(
        description="A request to the api, a `deltadock` command on the server, or the system "
        "itself: a worker, or the api in the background."
    )
    key: str | None = Field(
        description="The API key of the request; null for other origins.",
        examples=[EXAMPLE_KEY_ID],
    )
    key_name: str | None = Field(description="That key's name.", examples=["ci"])
    key_tenant: str | None = Field(description="The key's tenant.", examples=[EXAMPLE_TENANT_ID])
    request_id: str | None = Field(
        description="The request's `X-Request-ID`, which the api's log names too.",
        examples=["3f1c9b0e5d"],
    )
    action: AuditAction = Field(examples=["delta.delete"])
    object: str = Field(
        description="The id of what was changed; of a model or project its name, of a blob its "
        "digest, of a refused request its path.",
        examples=[EXAMPLE_DELTA_ID],
    )
    outcome: str = Field(description="`done`, or the code of the error.", examples=["done"])
    details: dict[str, Any] | None = Field(examples=[{"name": "maths/skills", "version": 3}])

    @classmethod
    def of(cls, row: AuditRow, key_names: Mapping[str, str]) -> Self:
        """Convert a row; `key_names` are by the keys' ids."""
        return cls(
            id=row.id,
            at=row.at,
            tenant=row.tenant_id,
            origin=row.origin,
            key=row.by_key_id,
            key_name=key_names.get(row.by_key_id or ""),
            key_tenant=row.by_tenant_id,
            request_id=row.request_id,
            action=row.action,
            object=row.object_id,
            outcome=row.outcome,
            details=row.details,
        )


class AuditPage(BaseModel):
    """Records, newest first. `next` is the next page's `after`; null on the last page."""

    data: list[AuditRecord]
    next: str | None


_CURSOR: Final = Cursor("audit", int)


@router.get("", responses=problems(Forbidden, InvalidInput, NotFound))
def list_audit_records(
    caller: CallerDep,
    session: ReadSession,
    action: Annotated[AuditAction | None, Query()] = None,
    object_id: Annotated[
        str | None, Query(alias="object", max_length=255, description="The object's id.")
    ] = None,
    key: Annotated[str | None, Query(max_length=40, description="The id of the API key.")] = None,
    tenant: OfTenant = None,
    after: After = None,
    limit: Limit = 50,
) -> AuditPage:
    """List who changed what of the tenant, newest first; nobody can change or delete a record."""
    place = _CURSOR.read(after)
    tenant_id = named_tenant(session, caller, tenant)
    found = AuditRepository(session, tenant_id).page(
        limit=limit + 1,
        before=None if place is None else place[0],
        action=action,
        object_id=object_id,
        key_id=key,
    )
    page, following = _CURSOR.page(found, limit, lambda row: [row.id])
    names = KeyRepository(session, tenant_id).names({r.by_key_id for r in page if r.by_key_id})
    return AuditPage(data=[AuditRecord.of(row, names) for row in page], next=following)
