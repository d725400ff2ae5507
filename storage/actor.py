"""Who acts: what the audit log records of whoever makes a change."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, NamedTuple

from deltadock.storage.tables import AuditOrigin


class Actor(NamedTuple):
    """The origin of changes; for requests with the key and its tenant."""

    origin: AuditOrigin
    tenant_id: str | None = None
    key_id: str | None = None
    request_id: str | None = None


SYSTEM: Final = Actor(AuditOrigin.SYSTEM)
COMMAND: Final = Actor(AuditOrigin.COMMAND)

_current: ContextVar[Actor] = ContextVar("actor", default=SYSTEM)


def current_actor() -> Actor:
    """Who acts in this task or thread; new threads act for the system."""
    return _current.get()


@contextmanager
def acting(actor: Actor) -> Iterator[None]:
    """Let `actor` act within the block, in this task and what it runs in the thread pool."""
    token = _current.set(actor)
    try:
        yield
    finally:
        _current.reset(token)
