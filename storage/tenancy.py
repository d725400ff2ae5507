"""The tenant filter: every repository of tenants' rows is made for one tenant, or for all."""

from enum import Enum, auto
from typing import Final, Literal

from sqlalchemy import ColumnElement, true
from sqlalchemy.orm import InstrumentedAttribute

LOCAL_TENANT: Final = "ten_local"
"""The operator's tenant, made by the migration; what was stored before tenants belongs to it."""


class TenantScope(Enum):
    """Rows of more than one tenant."""

    EVERY = auto()


EVERY_TENANT: Final = TenantScope.EVERY
"""For workers and sweepers, which serve all tenants."""

Tenant = str | Literal[TenantScope.EVERY]
"""A tenant's id, or `EVERY_TENANT`."""


def owned_by(
    column: InstrumentedAttribute[str] | ColumnElement[str], tenant: Tenant
) -> ColumnElement[bool]:
    """The condition that a row belongs to the tenant."""
    return true() if tenant is EVERY_TENANT else column == tenant


def owner_of(tenant: Tenant) -> str:
    """The tenant that a new row belongs to.

    Raises:
        ValueError: the repository is made for every tenant.
    """
    if tenant is EVERY_TENANT:
        raise ValueError("A new row needs one tenant.")
    return tenant
