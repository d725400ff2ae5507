"""Routing of requests to inference nodes, by loaded base, delta residency and load."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, get_args

import anyio
import structlog
from starlette.concurrency import run_in_threadpool

from deltadock.model_target import ModelTarget, Tier
from deltadock.storage.database import Database
from deltadock.storage.repositories import NodeRepository
from deltadock.storage.tables import NodeRow

log = structlog.get_logger(__name__)

CACHE_SECONDS: Final = 0.5
TIERS: Final[tuple[Tier, ...]] = get_args(Tier)[::-1]
"""From the fastest to the slowest."""


@dataclass(frozen=True, slots=True)
class NodeView:
    """The fields of a node that routing uses."""

    id: str
    url: str
    base_digest: str | None
    adopts: bool
    draining: bool
    capacity: int
    admitted: int
    context_tokens: int | None
    """Of the longest sequence, the answer included."""
    lives_seconds: float
    """Its registration expires after this time without a heartbeat."""
    tiers: Mapping[str, str]
    """Artifact digest to the fastest tier that holds it."""

    @classmethod
    def of(cls, node: NodeRow) -> "NodeView":
        """Convert a row."""
        return cls(
            id=node.id,
            url=node.url,
            base_digest=node.base_digest,
            adopts=node.adopts,
            draining=node.draining,
            capacity=node.capacity,
            admitted=node.admitted,
            context_tokens=node.context_tokens,
            lives_seconds=(node.expires_at - node.seen_at).total_seconds(),
            tiers={held["digest"]: held["tier"] for held in node.deltas},
        )


def serves(node: NodeView, target: ModelTarget) -> bool:
    """Whether the node has the base or may load it."""
    return node.adopts or node.base_digest == target.base_digest


def rank(nodes: Iterable[NodeView], target: ModelTarget, sent: Mapping[str, int]) -> list[NodeView]:
    """The nodes that can serve `target`, best first.

    Nodes that have the base loaded; if there are none, nodes that load bases on request, empty
    ones first. Full nodes come last; then the delta's tier decides, then the load.

    Args:
        nodes: all registered nodes.
        target: base and artifact, by digest.
        sent: requests in flight from this process, by node id.
    """
    available = [node for node in nodes if not node.draining]
    with_base = [node for node in available if node.base_digest == target.base_digest]

    def order(node: NodeView) -> tuple[bool, bool, int, float]:
        # The node's own report may be a heartbeat old; our count is current.
        load = max(node.admitted, sent.get(node.id, 0)) / node.capacity
        tier = node.tiers.get(target.artifact_digest or "")
        distance = len(TIERS) if tier is None else TIERS.index(tier)
        return node.base_digest not in {None, target.base_digest}, load >= 1, distance, load

    return sorted(with_base or [node for node in available if node.adopts], key=order)


class Fleet:
    """The registered nodes, cached briefly, and requests in flight; for one event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sent: Counter[str] = Counter()
        self._nodes: list[NodeView] = []
        self._read_at = float("-inf")
        self._reading = anyio.Lock()

    async def nodes(self) -> list[NodeView]:
        """The registered nodes, at most `CACHE_SECONDS` old.

        Raises:
            Unavailable: the database does not answer.
        """
        async with self._reading:
            if time.monotonic() - self._read_at > CACHE_SECONDS:
                self._nodes = await run_in_threadpool(self._read)
                self._read_at = time.monotonic()
            return self._nodes

    def _read(self) -> list[NodeView]:
        with self._database.read_scope() as session:
            return [NodeView.of(node) for node in NodeRepository(session).alive()]

    def invalidate(self) -> None:
        """Discard the cached nodes."""
        self._read_at = float("-inf")

    async def candidates(self, target: ModelTarget) -> list[NodeView]:
        """The nodes that can serve `target`, best first."""
        return rank(await self.nodes(), target, self._sent)

    async def longest_context(self, target: ModelTarget) -> int | None:
        """Tokens that no sequence of `target` exceeds, prompt and answer; None: not known."""
        found = [node.context_tokens for node in await self.candidates(target)]
        known = [tokens for tokens in found if tokens is not None]
        return max(known) if known and len(known) == len(found) else None

    async def is_registered(self, node: NodeView) -> bool:
        """Whether the node's registration is unexpired."""
        return any(known.id == node.id for known in await self.nodes())

    async def remove(self, node: NodeView) -> None:
        """Deregister a node that failed; its next heartbeat registers it again."""
        log.warning("node_lost", node=node.id, url=node.url)

        def drop() -> None:
            with self._database.session_scope() as session:
                NodeRepository(session).drop(node.id)

        await run_in_threadpool(drop)
        self.invalidate()

    @contextmanager
    def sending(self, node: NodeView) -> Iterator[None]:
        """Count one request in flight on the node while the block runs."""
        self._sent[node.id] += 1
        try:
            yield
        finally:
            self._sent[node.id] -= 1
            if not self._sent[node.id]:
                del self._sent[node.id]
