"""Finds the caller of a request by its API key, or by the session of the dashboard."""

import hmac
import threading
import time
from functools import cached_property
from typing import Final, NamedTuple

import structlog

from deltadock.api.access.caller import Caller
from deltadock.errors import DeltadockError, Unauthorized
from deltadock.settings import Settings
from deltadock.storage.api_keys import hmac_of, key_secret, prefix_of
from deltadock.storage.database import Database
from deltadock.storage.repositories import KeyRepository
from deltadock.storage.tables import ApiKeyRow
from deltadock.storage.tenancy import EVERY_TENANT

log = structlog.get_logger(__name__)

CACHE_SECONDS: Final = 1.0
"""How long other processes of the api may still accept a revoked key."""
MAX_CACHED: Final = 10_000
ANOTHER: Final = (
    "Use another: `deltadock keys create` makes one, on the server's machine without a key too."
)


class _Known(NamedTuple):
    caller: Caller
    until: float


class Authenticator:
    """Checks keys against the database; calls block unless they say otherwise.

    Threads may share it.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        self._settings = settings
        self._database = database
        self._known: dict[str, _Known] = {}
        self._revocations = 0
        self._used: set[str] = set()
        self._lock = threading.Lock()

    @cached_property
    def secret(self) -> str:
        """The secret under which keys are stored."""
        return key_secret(self._settings)

    def caller_of_key(self, key: str) -> Caller:
        """The caller with this API key.

        Raises:
            Unauthorized: the key is malformed, unknown, revoked or expired.
        """
        prefix = prefix_of(key)
        if prefix is None:
            raise Unauthorized(
                "This is not an API key of Deltadock: it is mistyped, cut off or another service's."
            )
        digest = hmac_of(key, self.secret)
        revocations = self._revocations
        with self._database.read_scope() as session:
            keys = KeyRepository(session, EVERY_TENANT)
            row = keys.find_prefix(prefix)
            if row is None or not hmac.compare_digest(row.hmac, digest):
                raise Unauthorized("There is no such API key. Ask an admin of your tenant for one.")
            return self._remember(digest, keys, row, revocations)

    def caller_of_session(self, key_id: str) -> Caller:
        """The caller that signed in with this key's secret.

        Raises:
            Unauthorized: the key was revoked or has expired.
        """
        revocations = self._revocations
        with self._database.read_scope() as session:
            keys = KeyRepository(session, EVERY_TENANT)
            row = keys.find(key_id)
            if row is None:
                raise Unauthorized("The session's key does not exist. Sign in again.")
            return self._remember(key_id, keys, row, revocations)

    def recall(self, *, key: str | None = None, key_id: str | None = None) -> Caller | None:
        """The caller of a key that was checked in the last second, or None; does not block."""
        name = hmac_of(key, self.secret) if key is not None else key_id
        known = self._known.get(name or "")
        if known is None or known.until < time.monotonic():
            return None
        self._used.add(known.caller.key_id)
        return known.caller

    def forget(self) -> None:
        """Check every key anew in this process, after one was revoked."""
        with self._lock:
            self._revocations += 1
            self._known.clear()

    def write_uses(self) -> None:
        """Record in the database which keys were used since the last call."""
        with self._lock:
            used, self._used = self._used, set()
        if not used:
            return
        try:
            with self._database.session_scope() as session:
                KeyRepository(session, EVERY_TENANT).mark_used(used)
        except DeltadockError as error:  # the next call may succeed
            log.warning("key_uses_not_written", error=error.message)
            with self._lock:
                self._used |= used

    def _remember(self, name: str, keys: KeyRepository, row: ApiKeyRow, revocations: int) -> Caller:
        if row.revoked_at is not None:
            raise Unauthorized(f"The API key {row.prefix} was revoked. {ANOTHER}")
        if not keys.is_active(row):
            raise Unauthorized(f"The API key {row.prefix} has expired. {ANOTHER}")
        caller = Caller.of(row)
        with self._lock:
            if len(self._known) >= MAX_CACHED:
                self._known.clear()
            if revocations == self._revocations:  # else the row may be of before
                self._known[name] = _Known(caller, time.monotonic() + CACHE_SECONDS)
            self._used.add(caller.key_id)
        return caller
