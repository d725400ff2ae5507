"""Inference nodes: who is there, and with what."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import and_, delete, or_, select
from sqlalchemy.orm import Session

from deltadock.storage.models import NodeRow
from deltadock.storage.types import database_now


class NodeRepository:
    """A node is there until its time is up; times are the database's clock."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def put(self, node_id: str, url: str, *, lives_seconds: float, **told: Any) -> NodeRow:
        """Record what a node tells of itself; it is there for `lives_seconds` more.

        Nodes whose time is up go, and so does who was at the same address before.
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
            **told,
        }
        for name, value in values.items():
            setattr(node, name, value)
        self.session.add(node)
        self.session.flush()
        return node

    def drop(self, node_id: str) -> None:
        """Forget a node, if it is there."""
        self.session.execute(delete(NodeRow).where(NodeRow.id == node_id))

    def alive(self) -> Sequence[NodeRow]:
        """The nodes that are there, by their start."""
        now = database_now(self.session)
        return self.session.scalars(
            select(NodeRow).where(NodeRow.expires_at > now).order_by(NodeRow.started_at, NodeRow.id)
        ).all()
