"""API keys, made and revoked by a server, or in its database without one."""

import hmac
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

from sqlalchemy import make_url
from sqlalchemy.orm import Session

from deltadock.cli.server import connect, uses_server
from deltadock.client.resources import Key
from deltadock.errors import InvalidInput, NotFound
from deltadock.settings import Settings, deployed_in, settings_in
from deltadock.storage.actor import COMMAND, acting
from deltadock.storage.api_keys import hmac_of, key_secret, local_key_path, prefix_of
from deltadock.storage.database import Database, migrate
from deltadock.storage.repositories import KeyRepository, TenantRepository
from deltadock.storage.tables import ApiKeyRow, Scope
from deltadock.storage.tenancy import EVERY_TENANT, LOCAL_TENANT
from deltadock.trust import keep_secret

KeyT = TypeVar("KeyT", Key, ApiKeyRow)

LOCAL: Final = "local"
"""Name of the key that `deltadock up` makes for its own machine."""


def create(
    home: Path | None,
    url: str | None,
    name: str,
    tenant: str | None,
    scopes: Sequence[str],
    days: float | None,
) -> Key:
    """Make a key; the answer has the key itself.

    Raises:
        InvalidInput: there is no such scope.
        NotFound: there is no such tenant.
    """
    if unknown := set(scopes) - set(Scope):
        raise InvalidInput(f"There is no scope {', '.join(unknown)}; they are {', '.join(Scope)}.")
    expires_at = None if days is None else datetime.now(UTC) + timedelta(days=days)
    if uses_server(home, url):
        with connect(url) as client:
            expiry = None if expires_at is None else expires_at.isoformat()
            return client.create_key(name, scopes, expires_at=expiry, tenant=tenant)
    return issue(settings_in(home), name, tenant, scopes, expires_at)


def issue(
    settings: Settings,
    name: str,
    tenant: str | None,
    scopes: Sequence[str],
    expires_at: datetime | None,
) -> Key:
    """Make a key in the settings' database.

    Raises:
        NotFound: there is no such tenant.
    """
    with _session(settings) as session:
        found = TenantRepository(session).find(tenant or LOCAL_TENANT)
        if found is None:
            raise NotFound(
                f"There is no tenant {tenant!r}; make it with `deltadock tenants create {tenant}`."
            )
        row, key = KeyRepository(session, found.id).issue(
            key_secret(settings), name=name, scopes=map(Scope, scopes), expires_at=expires_at
        )
        return _key_of(row, key)


def list_all(home: Path | None, url: str | None) -> list[Key]:
    """The keys, newest first: of one's tenant, or in the database of all."""
    if uses_server(home, url):
        with connect(url) as client:
            return list(client.keys())
    with _session(deployed_in(home)) as session:
        return [_key_of(row) for row in KeyRepository(session, EVERY_TENANT).all()]


def revoke(home: Path | None, url: str | None, key: str) -> Key:
    """Revoke the key with this id, prefix or name.

    Raises:
        NotFound: there is none.
        InvalidInput: several have this name.
    """
    if uses_server(home, url):
        with connect(url) as client:
            found = _find(client.keys(), key)
            client.revoke_key(found.id)
            return found
    with _session(deployed_in(home)) as session:
        keys = KeyRepository(session, EVERY_TENANT)
        row = _find(keys.all(), key)
        keys.revoke(row)
        return _key_of(row)


def rotate(home: Path | None, url: str | None, key: str, grace_hours: float) -> Key:
    """Make a key like this one, which expires after the grace period.

    Raises:
        NotFound: there is none.
        InvalidInput: several have this name.
        Conflict: it was revoked or has expired.
    """
    grace = timedelta(hours=grace_hours)
    if uses_server(home, url):
        with connect(url) as client:
            found = _find(client.keys(), key)
            return client.rotate_key(found.id, round(grace.total_seconds()))
    settings = deployed_in(home)
    with _session(settings) as session:
        keys = KeyRepository(session, EVERY_TENANT)
        row, made = keys.rotate(key_secret(settings), _find(keys.all(), key), grace)
        return _key_of(row, made)


def _key_of(row: ApiKeyRow, key: str | None = None) -> Key:
    """A row as the api answers it."""
    return Key(
        id=row.id,
        tenant=row.tenant_id,
        tenant_name=row.tenant.name,
        name=row.name,
        prefix=row.prefix,
        scopes=row.scopes,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
        key=key,
    )


def _find(keys: Iterable[KeyT], wanted: str) -> KeyT:
    """The key with this id or prefix, else the only one with this name that is not revoked."""
    listed = list(keys)
    found = [key for key in listed if wanted in (key.id, key.prefix)] or [
        key for key in listed if key.name == wanted and key.revoked_at is None
    ]
    if len(found) > 1:
        raise InvalidInput(
            f"{len(found)} keys have the name {wanted!r}: give an id; `deltadock keys list` shows "
            "them."
        )
    if not found:
        raise NotFound(f"There is no key {wanted!r}; `deltadock keys list` shows them.")
    return found[0]


def ensure_local_key(settings: Settings) -> str:
    """The id of this machine's key; a new one with all scopes if that of the home is not valid."""
    path = local_key_path(settings.home)
    secret = key_secret(settings)
    with _session(settings) as session:
        keys = KeyRepository(session, LOCAL_TENANT)
        text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        row = keys.find_prefix(prefix_of(text) or "")
        is_same = row is not None and hmac.compare_digest(row.hmac, hmac_of(text, secret))
        if row is not None and is_same and keys.is_active(row):
            return row.id
        row, key = keys.issue(secret, name=LOCAL, scopes=Scope)
        keep_secret(path, key)
        return row.id


def has_made_key(settings: Settings, local_key_id: str) -> bool:
    """Whether there is a valid key besides those that `deltadock up` makes itself."""
    with _session(settings) as session:
        keys = KeyRepository(session, EVERY_TENANT)
        return any(
            keys.is_active(key)
            for key in keys.all()
            if key.id != local_key_id and (key.name, key.tenant_id) != (LOCAL, LOCAL_TENANT)
        )


@contextmanager
def _session(settings: Settings) -> Iterator[Session]:
    url = settings.sqlalchemy_url
    if make_url(url).get_backend_name() == "sqlite":
        migrate(url)  # a home's first command may be this one
    database = Database(url)
    try:
        with acting(COMMAND), database.session_scope() as session:
            yield session
    finally:
        database.dispose()
