"""What one api process holds on to. Nothing connects until it is first used."""

from dataclasses import dataclass
from typing import Self

import httpx
from starlette.concurrency import run_in_threadpool

from api.tasks import TaskSender
from deltadock.settings import Settings
from storage.blobs import BlobStore, make_blob_store
from storage.database import Database


@dataclass(frozen=True, slots=True)
class Resources:
    """Connections and settings, shared by all requests."""

    settings: Settings
    database: Database
    blobs: BlobStore
    tasks: TaskSender
    node: httpx.AsyncClient

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """What these settings name."""
        return cls(
            settings=settings,
            database=Database(settings.sqlalchemy_url),
            blobs=make_blob_store(settings),
            tasks=TaskSender(settings.broker_url),
            node=httpx.AsyncClient(
                base_url=settings.node_url,
                # A long prompt may take minutes until its first token.
                timeout=httpx.Timeout(600.0, connect=5.0),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=50),
            ),
        )

    async def close(self) -> None:
        """Give every connection back."""
        await self.node.aclose()
        await run_in_threadpool(self.tasks.close)
        await run_in_threadpool(self.database.dispose)
