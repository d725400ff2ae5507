"""The caller: the tenant that a request's key belongs to, and what the key may do."""

from dataclasses import dataclass
from typing import Annotated, Self

from fastapi import Depends, Request

from deltadock.storage.actor import Actor
from deltadock.storage.tables import ApiKeyRow, AuditOrigin, Scope


@dataclass(frozen=True, slots=True)
class Caller:
    """The tenant and key of a request; every query is filtered by the tenant."""

    tenant_id: str
    key_id: str
    scopes: frozenset[Scope]
    is_operator: bool
    """Whether the tenant is the operator's."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @classmethod
    def of(cls, key: ApiKeyRow) -> Self:
        """Convert a key's row, with its tenant loaded."""
        return cls(
            tenant_id=key.tenant_id,
            key_id=key.id,
            scopes=frozenset(map(Scope, key.scopes)),
            is_operator=key.tenant.is_operator,
            requests_per_minute=key.tenant.requests_per_minute,
            tokens_per_minute=key.tenant.tokens_per_minute,
        )

    def acting_in(self, request: Request) -> Actor:
        """Who acts, for the audit log."""
        return Actor(AuditOrigin.REQUEST, self.tenant_id, self.key_id, request.state.request_id)


async def get_caller(request: Request) -> Caller:
    """The request's caller, as `AccessControl` found it."""
    caller: Caller = request.state.caller
    return caller


CallerDep = Annotated[Caller, Depends(get_caller)]
