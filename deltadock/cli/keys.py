"""`deltadock keys`: API keys, made and revoked in the database without a running service."""

import hmac
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from sqlalchemy import make_url
from sqlalchemy.orm import Session

from deltadock.errors import InvalidInput, NotFound
from deltadock.settings import Settings, settings_in
from deltadock.storage.actor import COMMAND, acting
from deltadock.storage.api_keys import hmac_of, key_secret, local_key_path, prefix_of
from deltadock.storage.database import Database, migrate
from deltadock.storage.models import ApiKeyRow, Scope
from deltadock.storage.repositories import KeyRepository, TenantRepository
from deltadock.storage.tenancy import EVERY_TENANT, LOCAL_TENANT
from deltadock.trust import keep_secret

LOCAL: Final = "local"
"""Name of the key that `deltadock up` makes for its own machine."""


def create(
    home: Path | None, name: str, tenant: str, scopes: Sequence[str], days: float | None
) -> None:
    """Make a key and print it.

    Raises:
        InvalidInput: there is no such scope.
        NotFound: there is no such tenant.
    """
    if unknown := set(scopes) - set(Scope):
        raise InvalidInput(f"There is no scope {', '.join(unknown)}; they are {', '.join(Scope)}.")
    settings = settings_in(home)
    expires_at = None if days is None else datetime.now(UTC) + timedelta(days=days)
    with _session(settings) as session:
        found = TenantRepository(session).find(tenant)
        if found is None:
            raise NotFound(f"There is no tenant {tenant!r}; make it with POST /v1/tenants.")
        row, key = KeyRepository(session, found.id).issue(
            key_secret(settings), name=name, scopes=map(Scope, scopes), expires_at=expires_at
        )
    _show_new(row, key)


def show(home: Path | None) -> None:
    """Print the keys of all tenants, newest first."""
    table = Table("id", "tenant", "name", "prefix", "scopes", "expires", "last used", "state")
    with _session(settings_in(home)) as session:
        keys = KeyRepository(session, EVERY_TENANT)
        for key in keys.all():
            state = "revoked" if key.revoked_at else "valid" if keys.is_active(key) else "expired"
            times = (_moment(key.expires_at), _moment(key.last_used_at))
            cells = (key.id, key.tenant.name, key.name, key.prefix, " ".join(key.scopes))
            table.add_row(*cells, *times, state)
    Console().print(table)


def revoke(home: Path | None, key: str) -> None:
    """Revoke the key with this id or prefix.

    Raises:
        NotFound: there is none.
    """
    with _session(settings_in(home)) as session:
        keys = KeyRepository(session, EVERY_TENANT)
        row = _find(keys, key)
        keys.revoke(row)
    Console().print(f"{row.prefix} ({row.name}) is revoked.")


def rotate(home: Path | None, key: str, grace_hours: float) -> None:
    """Make a key like this one, which expires after the grace period, and print it.

    Raises:
        NotFound: there is none.
        Conflict: it was revoked or has expired.
    """
    settings = settings_in(home)
    with _session(settings) as session:
        keys = KeyRepository(session, EVERY_TENANT)
        old = _find(keys, key)
        row, made = keys.rotate(key_secret(settings), old, timedelta(hours=grace_hours))
    _show_new(row, made)
    Console(stderr=True).print(f"{old.prefix} works until {_moment(old.expires_at)}.")


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


def _find(keys: KeyRepository, key: str) -> ApiKeyRow:
    found = keys.find(key) or keys.find_prefix(key)
    if found is None:
        raise NotFound(f"There is no key {key!r}; `deltadock keys list` shows them.")
    return found


def _show_new(row: ApiKeyRow, key: str) -> None:
    expiry = "never expires" if row.expires_at is None else f"expires {_moment(row.expires_at)}"
    Console(stderr=True).print(
        f"{row.name}: {' '.join(row.scopes)}, of tenant {row.tenant.name}, {expiry}. "
        "The key is shown only now:"
    )
    Console().print(key, soft_wrap=True, highlight=False)


def _moment(moment: datetime | None) -> str:
    return "never" if moment is None else f"{moment:%Y-%m-%d %H:%M} UTC"
