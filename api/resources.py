"""What one api process holds on to. Nothing connects until it is first used."""

from dataclasses import dataclass
from typing import Self

import httpx
from starlette.concurrency import run_in_threadpool

from deltadock.api.nodes.fleet import Fleet
from deltadock.api.tasks import TaskSender
from deltadock.settings import Settings
from deltadock.storage.blobs import BlobStore, make_blob_store
from deltadock.storage.database import Database


@dataclass(frozen=True, slots=True)
class Resources:
    """Connections and settings, shared by all requests."""

    settings: Settings
    database: Database
    blobs: BlobStore
    tasks: TaskSender
    http: httpx.AsyncClient
    """For the nodes."""
    fleet: Fleet

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """What these settings name."""
        database = Database(settings.sqlalchemy_url)
        return cls(
            settings=settings,
            database=database,
            blobs=make_blob_store(settings),
            tasks=TaskSender(settings.broker_url),
            http=httpx.AsyncClient(
                # A long prompt may take minutes until its first token.
                timeout=httpx.Timeout(600.0, connect=5.0),
                # A node closes what was idle for five seconds; we must not be surprised by that.
                limits=httpx.Limits(
                    max_connections=None, max_keepalive_connections=50, keepalive_expiry=2.0
                ),
                trust_env=False,
            ),
            fleet=Fleet(database),
        )

    async def close(self) -> None:
        """Give every connection back."""
        await self.http.aclose()
        await run_in_threadpool(self.tasks.close)
        await run_in_threadpool(self.database.dispose)
