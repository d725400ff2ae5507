"""Refusals in the audit log: a bounded number, since whoever is refused could fill it."""

import threading
import time
from collections import Counter
from typing import Any, Final

import structlog

from deltadock.errors import DeltadockError
from deltadock.storage.actor import Actor, acting
from deltadock.storage.database import Database
from deltadock.storage.repositories.audit import record
from deltadock.storage.tables import AuditAction

PER_HOUR: Final = 60
"""Of one action and tenant, by one process; `deltadock_api_refusals_total` counts all."""

log = structlog.get_logger(__name__)


class Refusals:
    """Records refused requests; calls block, and threads may share it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._hour = 0
        self._recorded: Counter[tuple[str, AuditAction]] = Counter()

    def record(
        self,
        actor: Actor,
        tenant_id: str,
        action: AuditAction,
        object_id: str,
        outcome: str,
        **details: Any,
    ) -> None:
        """Record a refusal, unless this hour has enough; arguments as of `audit.record`."""
        hour = int(time.monotonic() // 3600)
        with self._lock:
            if hour != self._hour:
                self._hour = hour
                self._recorded.clear()
            self._recorded[tenant_id, action] += 1
            if self._recorded[tenant_id, action] > PER_HOUR:
                return
        try:
            with acting(actor), self._database.session_scope() as session:
                record(session, tenant_id, action, object_id, outcome=outcome, **details)
        except DeltadockError as error:  # it is refused all the same
            log.warning("refusal_not_recorded", outcome=outcome, error=error.message)
