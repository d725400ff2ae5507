"""Registered inference nodes, the deltas they hold, and what they did in the last hour."""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import and_, delete, or_, select
from sqlalchemy.orm import Session

from deltadock.storage.database import database_now
from deltadock.storage.tables import NodeRow, NodeSampleRow

SAMPLE_EVERY: Final = timedelta(seconds=15)
SAMPLES_KEPT: Final = timedelta(hours=1)


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
        self._sample(node, now)
        self.session.flush()
        return node

    def _sample(self, node: NodeRow, now: datetime) -> None:
        if node.usage is None:
            return
        if node.sampled_at is not None and now - node.sampled_at < SAMPLE_EVERY:
            return
        held = Counter(delta["tier"] for delta in node.deltas)
        self.session.execute(delete(NodeSampleRow).where(NodeSampleRow.at < now - SAMPLES_KEPT))
        self.session.add(
            NodeSampleRow(
                node_id=node.id,
                at=now,
                admitted=node.admitted,
                **{tier: held[tier] for tier in ("device", "host", "disk")},
                **node.usage,
            )
        )
        node.sampled_at = now

    def samples(self, node_ids: Sequence[str]) -> dict[str, list[NodeSampleRow]]:
        """Each node's samples of the last hour, oldest first."""
        found: dict[str, list[NodeSampleRow]] = {node_id: [] for node_id in node_ids}
        query = select(NodeSampleRow).where(NodeSampleRow.node_id.in_(node_ids))
        for sample in self.session.scalars(query.order_by(NodeSampleRow.at)):
            found[sample.node_id].append(sample)
        return found

    def drop(self, node_id: str) -> None:
        """Delete a node's registration, if it exists."""
        self.session.execute(delete(NodeRow).where(NodeRow.id == node_id))

    def alive(self) -> Sequence[NodeRow]:
        """Nodes with an unexpired registration, in order of their start."""
        now = database_now(self.session)
        return self.session.scalars(
            select(NodeRow).where(NodeRow.expires_at > now).order_by(NodeRow.started_at, NodeRow.id)
        ).all()
