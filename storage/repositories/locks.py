"""Taking turns where a unique constraint alone would not do."""

import hashlib

from sqlalchemy import func, select
from sqlalchemy.orm import Session


def take_turn(session: Session, *key: str) -> None:
    """Hold a lock on `key` until the transaction ends; others with the same key wait.

    SQLite needs none: its writing transactions already run one at a time.
    """
    if session.get_bind().dialect.name == "postgresql":
        number = hashlib.sha256("\0".join(key).encode()).digest()[:8]
        signed = int.from_bytes(number, "big", signed=True)
        session.execute(select(func.pg_advisory_xact_lock(signed)))
