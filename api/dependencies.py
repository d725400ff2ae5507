"""FastAPI dependencies: the process's resources, read sessions and units of work."""

import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Final, Self

import anyio
import httpx
from fastapi import Depends, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from deltadock.api.access.authentication import Authenticator
from deltadock.api.access.rates import Rates
from deltadock.api.access.refusals import Refusals
from deltadock.api.access.sessions import Sessions
from deltadock.api.fleet import Fleet
from deltadock.api.job_watch import JobWatch
from deltadock.api.storage_meter import StorageMeter
from deltadock.api.tasks import TaskSender
from deltadock.api.uploads.arrivals import Arrivals
from deltadock.api.uploads.completion import Completer
from deltadock.settings import Settings
from deltadock.storage.blobs import BlobStore, make_blob_store
from deltadock.storage.database import Database

KEEPALIVE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
"""Breaks a silent connection 30 s after the other machine has vanished."""

COMPARISONS: Final = 2
"""Of checkpoints, at once."""
SILENT_SECONDS: Final = 20.0
"""Of a Postgres until a request is told that it does not answer; a request's statements take less,
and wait for others' less."""
PROBES: Final = 2
"""Of one part, at once, whether it answers."""


@dataclass(frozen=True, slots=True)
class Resources:
    """Settings and connections, shared by all requests of a process; they connect lazily."""

    settings: Settings
    database: Database
    blobs: BlobStore
    tasks: TaskSender
    http: httpx.AsyncClient
    """For requests to the nodes."""
    fleet: Fleet
    jobs: JobWatch
    """The jobs that clients follow."""
    storage: StorageMeter
    arrivals: Arrivals
    completer: Completer
    keys: Authenticator
    sessions: Sessions
    refusals: Refusals
    rates: Rates
    comparing: anyio.CapacityLimiter
    """Of threads that compare checkpoints; those that wait for one keep none."""
    probing: defaultdict[str, anyio.CapacityLimiter]
    """Of threads that ask whether a part answers, by its name: one that does not answer may keep
    them for minutes."""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The resources that the settings select."""
        database = Database(settings.sqlalchemy_url, SILENT_SECONDS)
        blobs = make_blob_store(settings)
        return cls(
            settings=settings,
            database=database,
            blobs=blobs,
            tasks=TaskSender(settings.broker_url),
            http=httpx.AsyncClient(
                # A long answer takes many minutes, and no byte of it is sent before its end, unless
                # it is streamed. Who waits watches the node's heartbeats instead of the time.
                timeout=httpx.Timeout(None, connect=5.0),
                transport=httpx.AsyncHTTPTransport(
                    # A machine that vanished closes no connection: only fresh ones are used again.
                    limits=httpx.Limits(
                        max_connections=None, max_keepalive_connections=50, keepalive_expiry=2.0
                    ),
                    socket_options=KEEPALIVE,
                    trust_env=False,
                ),
                trust_env=False,
            ),
            fleet=Fleet(database),
            jobs=JobWatch(database),
            arrivals=Arrivals(),
            completer=Completer(database, blobs, settings),
            storage=StorageMeter(database, blobs),
            keys=Authenticator(database, settings),
            sessions=Sessions(settings),
            refusals=Refusals(database),
            rates=Rates(settings.broker_url),
            comparing=anyio.CapacityLimiter(COMPARISONS),
            probing=defaultdict(lambda: anyio.CapacityLimiter(PROBES)),
        )

    async def close(self) -> None:
        """Close all connections."""
        await run_in_threadpool(self.completer.close)
        await self.http.aclose()
        await self.rates.close()
        await run_in_threadpool(self.keys.write_uses)
        await run_in_threadpool(self.tasks.close)
        await run_in_threadpool(self.database.dispose)


# Dependencies that do not block are coroutines: FastAPI would run each one in a thread of its own.


async def get_resources(request: Request) -> Resources:
    """The app's resources."""
    resources: Resources = request.app.state.resources
    return resources


ResourcesDep = Annotated[Resources, Depends(get_resources)]


async def read_session(resources: ResourcesDep) -> AsyncIterator[Session]:
    """A read-only session; it connects in the endpoint's thread.

    Only endpoints use it: a dependency that did would hold its connection while the endpoint waits
    for a thread, and all threads may wait for connections. It closes in a thread of its own for the
    same reason.
    """
    with resources.database.read_scope() as session:
        try:
            yield session
        finally:
            if not resources.database.is_file:
                await anyio.to_thread.run_sync(session.close, limiter=anyio.CapacityLimiter(1))


@dataclass(slots=True)
class UnitOfWork:
    """One request's changes: committed once, after the endpoint and before the response."""

    session: Session
    after_commit: list[Callable[[], object]] = field(default_factory=list)
    """Actions that must wait for the commit, such as sending a task."""


def unit_of_work(resources: ResourcesDep) -> Iterator[UnitOfWork]:
    """A session that commits when the endpoint returns, then runs the `after_commit` actions."""
    with resources.database.session_scope() as session:
        unit = UnitOfWork(session)
        yield unit
    for action in unit.after_commit:
        action()


# The scope "function" ends these before the response is sent: success is reported only after the
# commit, and no connection is held while a slow client reads.
ReadSession = Annotated[Session, Depends(read_session, scope="function")]
WriteUnit = Annotated[UnitOfWork, Depends(unit_of_work, scope="function")]
