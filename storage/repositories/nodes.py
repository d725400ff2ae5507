"""Registered inference nodes and the deltas they hold."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import and_, delete, or_, select
from sqlalchemy.orm import Session

from deltadock.storage.database import database_now
from deltadock.storage.models import NodeRow


class NodeRepository:
    """Registrations expire; times are from the database's clock."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def put(self, node_id: str, url: str, *, lives_seconds: float, **reported: Any) -> NodeRow:
        """Record a node's heartbeat; the registration expires after `lives_seconds`.

        Deletes expired registrations and any earlier node at the same URL.
        """
        now = database_now(self.session)
        successor_of = and_(NodeRow.url == url, NodeRow.id != node_id)
        self.session.execute(delete(NodeRow).where(or_(successor_of, NodeRow.expires_at <= now)))
        found = self.session.get(NodeRow, node_id)
        node = found or NodeRow(id=node_id, started_at=now)
        values = {
            "url": url,
            "seen_at": now,
            "expires_at": now + timedelta(seconds=lives_seconds),
            **reported,
        }
        for name, value in values.items():
            setattr(node, name, value)
        self.session.add(node)
        self.session.flush()
        return node

    def drop(self, node_id: str) -> None:
        """Delete a node's registration, if it exists."""
        self.session.execute(delete(NodeRow).where(NodeRow.id == node_id))

    def alive(self) -> Sequence[NodeRow]:
        """Nodes with an unexpired registration, in order of their start."""
        now = database_now(self.session)
        return self.session.scalars(
            select(NodeRow).where(NodeRow.expires_at > now).order_by(NodeRow.started_at, NodeRow.id)
        ).all()
