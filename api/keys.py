"""API keys: making, listing, revoking and rotating them."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Annotated, Final, Self

from fastapi import Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field, Strict, field_serializer
from sqlalchemy.orm import Session

from deltadock.api.access import Caller, CallerDep
from deltadock.api.dependencies import ReadSession, ResourcesDep, WriteUnit
from deltadock.api.idempotency import Once, OnceDep
from deltadock.api.paging import After, Cursor, Limit
from deltadock.api.routing import api_router
from deltadock.api.schemas import EXAMPLE_TIME, Moment, RequestBody
from deltadock.errors import Conflict, Forbidden, IdempotencyKeyReused, InvalidInput, NotFound
from deltadock.problems import problems
from deltadock.storage.repositories import KeyRepository, TenantRepository
from deltadock.storage.tables import ApiKeyRow, Scope

router = api_router("/v1/keys", tags=["keys"])

EXAMPLE_KEY_ID: Final = "key_k7wq2mzv5c3xj6nhy4tbr2dfsa"
EXAMPLE_TENANT_ID: Final = "ten_k7wq2mzv5c3xj6nhy4tbr2dfsa"
MAX_GRACE_SECONDS: Final = 30 * 24 * 3600

KeyId = Annotated[str, Path(examples=[EXAMPLE_KEY_ID])]
OfTenant = Annotated[
    str | None,
    Query(max_length=96, description="A tenant's id or name, for operators; by default one's own."),
]


class KeyIn(RequestBody):
    """A key to make."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"name": "ci", "scopes": ["read", "write"]}]}
    )

    name: str = Field(min_length=1, max_length=96, description="What the key is for.")
    scopes: Annotated[set[Annotated[Scope, Strict(False)]], Strict(False)] = Field(min_length=1)
    expires_at: Moment | None = Field(default=None, description="By default never.")
    tenant: str | None = Field(
        default=None,
        max_length=96,
        description="A tenant's id or name, for operators; by default one's own.",
    )

    @field_serializer("scopes")
    def _in_order(self, scopes: set[Scope]) -> list[Scope]:
        """Equal bodies have one form in every process."""
        return sorted(scopes)


class RotateIn(RequestBody):
    """How long the old key keeps working."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"grace_seconds": 3600}]})

    grace_seconds: int = Field(default=24 * 3600, ge=0, le=MAX_GRACE_SECONDS)


class KeyOut(BaseModel):
    """An API key, without the key itself."""

    id: str = Field(examples=[EXAMPLE_KEY_ID])
    tenant: str = Field(description="The tenant's id.", examples=[EXAMPLE_TENANT_ID])
    tenant_name: str = Field(examples=["acme"])
    name: str = Field(examples=["ci"])
    prefix: str = Field(description="The key's readable start.", examples=["ddk_Zr5TnQ0a"])
    scopes: list[Scope]
    created_at: datetime = Field(examples=[EXAMPLE_TIME])
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = Field(default=None, description="To the minute.")

    @classmethod
    def of(cls, key: ApiKeyRow) -> Self:
        """Convert a row."""
        return cls(
            id=key.id,
            tenant=key.tenant_id,
            tenant_name=key.tenant.name,
            name=key.name,
            prefix=key.prefix,
            scopes=[Scope(scope) for scope in key.scopes],
            created_at=key.created_at,
            expires_at=key.expires_at,
            revoked_at=key.revoked_at,
            last_used_at=key.last_used_at,
        )


class NewKeyOut(KeyOut):
    """A new API key; the key itself is shown only here."""

    key: str = Field(examples=["ddk_Zr5TnQ0a_..."])

    @classmethod
    def made(cls, row: ApiKeyRow, key: str) -> Self:
        """Convert a new row."""
        return cls(**KeyOut.of(row).model_dump(), key=key)


class KeyPage(BaseModel):
    """Keys, newest first; revoked and expired ones too. `next` is the next page's `after`."""

    data: list[KeyOut]
    next: str | None


_CURSOR: Final = Cursor("keys", datetime, str)


def named_tenant(session: Session, caller: Caller, tenant: str | None) -> str:
    """The id of the caller's tenant, or of the named one for an operator.

    Raises:
        Forbidden: the caller is no operator.
        NotFound: there is no such tenant.
    """
    if tenant is None:
        return caller.tenant_id
    if not caller.is_operator:
        raise Forbidden("Only operators may name a tenant: leave `tenant` out.")
    found = TenantRepository(session).find(tenant)
    if found is None:
        raise NotFound(f"There is no tenant {tenant!r}; GET /v1/tenants lists them.")
    return found.id


def _keys(session: Session, caller: Caller, tenant: str | None) -> KeyRepository:
    return KeyRepository(session, named_tenant(session, caller, tenant))


def _existing(key: ApiKeyRow | None, key_id: str) -> ApiKeyRow:
    if key is None:
        raise NotFound(f"There is no key {key_id!r}; GET /v1/keys lists them.")
    return key


def _shown_once(
    once: Once, body: BaseModel, response: Response, make: Callable[[], tuple[ApiKeyRow, str]]
) -> NewKeyOut:
    """The key that `make` makes; its stored answer lacks the key itself.

    Raises:
        Conflict: the request is repeated, and its key was shown already.
    """
    shown: list[NewKeyOut] = []

    def work() -> KeyOut:
        row, key = make()
        shown.append(NewKeyOut.made(row, key))
        return KeyOut.of(row)

    first = once.answer(KeyOut, body, response, work)
    if not shown:
        raise Conflict(
            f"This request has made {first.id} already, and a key is shown once. If the answer was "
            "lost, revoke it and send the request with another Idempotency-Key.",
            key=first.id,
        )
    return shown[0]


@router.post(
    "",
    status_code=201,
    responses=problems(Conflict, Forbidden, IdempotencyKeyReused, InvalidInput, NotFound),
)
def create_key(
    body: KeyIn,
    caller: CallerDep,
    unit: WriteUnit,
    resources: ResourcesDep,
    once: OnceDep,
    response: Response,
) -> NewKeyOut:
    """Make a key. It is shown once: only an HMAC of it is stored."""
    keys = _keys(unit.session, caller, body.tenant)

    def make() -> tuple[ApiKeyRow, str]:
        return keys.issue(
            resources.keys.secret, name=body.name, scopes=body.scopes, expires_at=body.expires_at
        )

    return _shown_once(once, body, response, make)


@router.get("", responses=problems(Forbidden, NotFound))
def list_keys(
    *,
    caller: CallerDep,
    session: ReadSession,
    prefix: Annotated[
        str | None, Query(max_length=16, description="Only the key that starts with this.")
    ] = None,
    tenant: OfTenant = None,
    after: After = None,
    limit: Limit = 50,
) -> KeyPage:
    """List the tenant's keys, newest first; revoked and expired ones too."""
    keys = _keys(session, caller, tenant)
    place = _CURSOR.read(after)
    if prefix is not None:
        key = keys.find_prefix(prefix)
        return KeyPage(data=[] if key is None or place else [KeyOut.of(key)], next=None)
    found = keys.page(limit=limit + 1, after=place)
    page, following = _CURSOR.page(found, limit, lambda key: [key.created_at, key.id])
    return KeyPage(data=[KeyOut.of(key) for key in page], next=following)


@router.delete("/{key_id}", status_code=204, responses=problems(Forbidden, NotFound))
def revoke_key(
    key_id: KeyId,
    caller: CallerDep,
    unit: WriteUnit,
    resources: ResourcesDep,
    tenant: OfTenant = None,
) -> None:
    """Revoke a key; other processes of the api may accept it for a second longer."""
    keys = _keys(unit.session, caller, tenant)
    keys.revoke(_existing(keys.find(key_id), key_id))
    unit.after_commit.append(resources.keys.forget)


@router.post(
    "/{key_id}/rotate",
    status_code=201,
    responses=problems(Conflict, Forbidden, IdempotencyKeyReused, NotFound),
)
def rotate_key(
    *,
    key_id: KeyId,
    body: RotateIn,
    caller: CallerDep,
    unit: WriteUnit,
    resources: ResourcesDep,
    once: OnceDep,
    response: Response,
    tenant: OfTenant = None,
) -> NewKeyOut:
    """Make a key with the same name and scopes; the old one works until the grace has passed."""
    keys = _keys(unit.session, caller, tenant)
    old = _existing(keys.find(key_id), key_id)
    unit.after_commit.append(resources.keys.forget)
    grace = timedelta(seconds=body.grace_seconds)
    return _shown_once(once, body, response, lambda: keys.rotate(resources.keys.secret, old, grace))
