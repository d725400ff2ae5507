"""Tenants: the organisations that own bases, uploads and deltas, with their quotas and usage."""

from datetime import datetime
from typing import Annotated, Final, Self

from fastapi import Path, Response
from pydantic import BaseModel, ConfigDict, Field

from deltadock.api.access import CallerDep
from deltadock.api.dependencies import ReadSession, ResourcesDep, WriteUnit
from deltadock.api.idempotency import OnceDep
from deltadock.api.keys import EXAMPLE_TENANT_ID
from deltadock.api.paging import After, Cursor, Limit
from deltadock.api.routing import api_router
from deltadock.api.schemas import EXAMPLE_TIME, RequestBody
from deltadock.errors import Conflict, Forbidden, IdempotencyKeyReused, InvalidInput, NotFound
from deltadock.names import PART_PATTERN
from deltadock.problems import problems
from deltadock.storage.repositories import TenantRepository, Usage
from deltadock.storage.tables import TenantRow

router = api_router("/v1/tenants", tags=["tenants"])

MAX_COUNT: Final = 2**31 - 1
MAX_BYTES: Final = 2**62

TenantRef = Annotated[str, Path(description="A tenant's id or name.", examples=[EXAMPLE_TENANT_ID])]
Count = Annotated[int | None, Field(default=None, ge=0, le=MAX_COUNT)]


class Limits(RequestBody):
    """A tenant's quotas and rates; null: no limit."""

    max_bytes: int | None = Field(
        default=None,
        ge=0,
        le=MAX_BYTES,
        description="Of uploaded files and artifacts, equal ones counted once, and of each file "
        "that is announced or to be imported.",
    )
    max_deltas: Count
    max_jobs: int | None = Field(
        default=None, ge=0, le=MAX_COUNT, description="Unfinished jobs at once."
    )
    requests_per_minute: Count
    tokens_per_minute: int | None = Field(
        default=None, ge=0, le=MAX_COUNT, description="Of prompts and answers."
    )


class LimitsIn(Limits):
    """Limits to change; those that are left out stay."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"max_deltas": 100, "requests_per_minute": None}]}
    )


class TenantIn(Limits):
    """A tenant to make."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "acme", "max_bytes": 1_000_000_000_000}]}
    )

    name: str = Field(
        pattern=PART_PATTERN,
        description="Letters, digits, '.', '_' and '-'; at most 96.",
    )


class UsageOut(BaseModel):
    """What a tenant uses of its quotas."""

    bytes: int = Field(
        description="Of uploaded files and artifacts, equal ones counted once, and of each file "
        "that is announced or to be imported.",
        examples=[15_231_233_024],
    )
    deltas: int = Field(examples=[12])
    jobs: int = Field(description="Unfinished ones.", examples=[1])


class TenantOut(BaseModel):
    """A tenant."""

    id: str = Field(examples=[EXAMPLE_TENANT_ID])
    name: str = Field(examples=["acme"])
    is_operator: bool
    limits: Limits
    created_at: datetime = Field(examples=[EXAMPLE_TIME])

    @classmethod
    def of(cls, tenant: TenantRow) -> Self:
        """Convert a row."""
        return cls(
            id=tenant.id,
            name=tenant.name,
            is_operator=tenant.is_operator,
            limits=Limits.model_validate(
                {name: getattr(tenant, name) for name in Limits.model_fields}
            ),
            created_at=tenant.created_at,
        )


class TenantDetailOut(TenantOut):
    """A tenant with its usage."""

    usage: UsageOut

    @classmethod
    def with_usage(cls, tenant: TenantRow, usage: Usage) -> Self:
        """Convert a row."""
        return cls(**TenantOut.of(tenant).model_dump(), usage=UsageOut(**usage._asdict()))


class TenantPage(BaseModel):
    """Tenants, ordered by name. `next` is the next page's `after`."""

    data: list[TenantOut]
    next: str | None


_CURSOR: Final = Cursor("tenants", str)


def _existing(tenant: TenantRow | None, reference: str) -> TenantRow:
    if tenant is None:
        raise NotFound(f"There is no tenant {reference!r}.")
    return tenant


@router.post(
    "",
    status_code=201,
    responses=problems(Conflict, Forbidden, InvalidInput, IdempotencyKeyReused),
)
def create_tenant(body: TenantIn, unit: WriteUnit, once: OnceDep, response: Response) -> TenantOut:
    """Make a tenant; then make its first admin key with POST /v1/keys."""

    def create() -> TenantOut:
        tenants = TenantRepository(unit.session)
        tenant = tenants.add(body.name)
        _set_limits(tenants, tenant, body)
        return TenantOut.of(tenant)

    return once.answer(TenantOut, body, response, create)


@router.get("", responses=problems(Forbidden, NotFound))
def list_tenants(session: ReadSession, after: After = None, limit: Limit = 50) -> TenantPage:
    """List all tenants, by name."""
    place = _CURSOR.read(after)
    name = None if place is None else place[0]
    found = TenantRepository(session).page(limit=limit + 1, after=name)
    page, following = _CURSOR.page(found, limit, lambda row: [row.name])
    return TenantPage(data=[TenantOut.of(row) for row in page], next=following)


@router.get("/{tenant}", responses=problems(NotFound))
def get_tenant(tenant: TenantRef, caller: CallerDep, session: ReadSession) -> TenantDetailOut:
    """Get a tenant with its limits and usage: one's own, or any for an operator."""
    tenants = TenantRepository(session)
    found = tenants.find(tenant)
    if found is not None and found.id != caller.tenant_id and not caller.is_operator:
        found = None
    row = _existing(found, tenant)
    return TenantDetailOut.with_usage(row, tenants.usage(row.id))


@router.patch("/{tenant}", responses=problems(Forbidden, InvalidInput, NotFound))
def change_tenant(
    tenant: TenantRef, body: LimitsIn, unit: WriteUnit, resources: ResourcesDep
) -> TenantOut:
    """Change a tenant's limits; what is stored already stays."""
    tenants = TenantRepository(unit.session)
    row = _existing(tenants.find(tenant), tenant)
    _set_limits(tenants, row, body)
    unit.after_commit.append(resources.keys.forget)
    return TenantOut.of(row)


def _set_limits(tenants: TenantRepository, tenant: TenantRow, limits: Limits) -> None:
    if given := limits.model_dump(include=limits.model_fields_set & set(Limits.model_fields)):
        tenants.set_limits(tenant, given)
