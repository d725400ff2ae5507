"""The nodes as this process sees them: a moment's copy of the table, and what we sent to each."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import anyio
import structlog
from starlette.concurrency import run_in_threadpool

from deltadock.api.generation.target import Target
from deltadock.api.nodes.routing import NodeView, rank
from deltadock.storage.database import Database
from deltadock.storage.repositories import NodeRepository

log = structlog.get_logger(__name__)

FRESH_SECONDS: Final = 0.5


class Fleet:
    """Belongs to one event loop."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._sent: Counter[str] = Counter()
        self._nodes: list[NodeView] = []
        self._read_at = float("-inf")
        self._reading = anyio.Lock()

    async def nodes(self) -> list[NodeView]:
        """The nodes that are there, as of half a second ago at most.

        Raises:
            Unavailable: the database does not answer.
        """
        async with self._reading:
            if time.monotonic() - self._read_at > FRESH_SECONDS:
                self._nodes = await run_in_threadpool(self._read)
                self._read_at = time.monotonic()
            return self._nodes

    def _read(self) -> list[NodeView]:
        with self._database.read_scope() as session:
            return [NodeView.of(node) for node in NodeRepository(session).alive()]

    def changed(self) -> None:
        """Read the table again at the next question."""
        self._read_at = float("-inf")

    async def candidates(self, target: Target) -> list[NodeView]:
        """The nodes that may answer for these weights, best first."""
        return rank(await self.nodes(), target, self._sent)

    async def is_there(self, node: NodeView) -> bool:
        """Whether the node still tells of itself."""
        return any(known.id == node.id for known in await self.nodes())

    async def lost(self, node: NodeView) -> None:
        """A node broke off: nothing goes there until it tells of itself again."""
        log.warning("node_lost", node=node.id, url=node.url)

        def drop() -> None:
            with self._database.session_scope() as session:
                NodeRepository(session).drop(node.id)

        await run_in_threadpool(drop)
        self.changed()

    @contextmanager
    def sending(self, node: NodeView) -> Iterator[None]:
        """Count one request on the node while the block runs."""
        self._sent[node.id] += 1
        try:
            yield
        finally:
            self._sent[node.id] -= 1
            if not self._sent[node.id]:
                del self._sent[node.id]
