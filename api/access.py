"""Who sends a request: the tenant that its API key belongs to, and what the key may do."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends

from deltadock.storage.models import Scope
from deltadock.storage.tenancy import LOCAL_TENANT


@dataclass(frozen=True, slots=True)
class Caller:
    """The tenant and key of a request; every query is filtered by the tenant."""

    tenant_id: str
    key_id: str | None
    scopes: frozenset[Scope]
    is_operator: bool
    """Whether the tenant is the operator's."""


def get_caller() -> Caller:
    """The request's caller."""
    return Caller(LOCAL_TENANT, None, frozenset(Scope), is_operator=True)


CallerDep = Annotated[Caller, Depends(get_caller)]
