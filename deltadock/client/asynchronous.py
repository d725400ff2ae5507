"""`AsyncClient`: the methods of `Client`, to be awaited.

It sends the same requests. Uploads and downloads hash and move files in threads, so it has each
done by a `Client`.
"""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from functools import wraps
from inspect import signature
from itertools import count
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import anyio
import anyio.to_thread
import httpx

from deltadock.client import routes
from deltadock.client.blocking import Client, JobProgress, Push, ignore
from deltadock.client.connection import find_connection, http_options
from deltadock.client.methods import method_of
from deltadock.client.progress import default_bar
from deltadock.client.requests import (
    POLL_SECONDS,
    RECONNECTS,
    Call,
    Events,
    Lines,
    Pages,
    check,
    domain_error,
)
from deltadock.client.resources import Delta, Job, LogLine
from deltadock.errors import Cancelled, Unavailable

P = ParamSpec("P")
T = TypeVar("T")


def _in_thread(
    method: Callable[Concatenate[Client, P], T],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, T]]:
    """The asynchronous form of a method that moves files.

    It has a `Client` of its own, which sends nothing more once it is cancelled.
    """

    @wraps(method)
    async def call(client: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        transfer = client._begin_transfer()

        def work() -> T:
            with transfer:
                return method(transfer, *args, **kwargs)

        try:
            return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)
        finally:
            transfer._stop.set()
            client._transfers.discard(transfer)

    return call


def _pushing(
    start: Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, "Push"]],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, "AsyncPush"]]:
    """The method that starts a push, and returns what can be awaited of it."""

    @wraps(start)
    async def push(client: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> "AsyncPush":
        started = await start(client, *args, **kwargs)
        return AsyncPush(client, started.delta, started.job)

    vars(push)["__signature__"] = signature(start).replace(return_annotation="AsyncPush")
    return push


class AsyncClient:
    """`Client` for asynchronous programs; an asynchronous context manager.

    Args:
        url, key: as for `Client`.

    Raises:
        InvalidInput: `url` is not an address.
    """

    def __init__(self, url: str | None = None, key: str | None = None) -> None:
        self._http = httpx.AsyncClient(**http_options(url, key))
        self._connection = find_connection(url, key)
        self._transfers: set[Client] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; uploads and downloads that go on raise `Cancelled`."""
        for transfer in self._transfers:
            transfer._stop.set()
        await self._http.aclose()

    def _begin_transfer(self) -> Client:
        if self._http.is_closed:
            raise Cancelled("The client is closed.")
        transfer = Client(self._connection.url, self._connection.key)
        self._transfers.add(transfer)
        return transfer

    @property
    def url(self) -> str:
        """The api's address."""
        return str(self._http.base_url)

    __repr__ = Client.__repr__

    async def send(self, call: Call[T]) -> T:
        """As `Client.send`."""
        for attempt in count(1):
            try:
                return call.result(await self._http.request(**call.arguments()))
            except (httpx.RequestError, Unavailable) as error:
                await anyio.sleep(call.pause(attempt, error))
        raise AssertionError

    async def items(self, pages: Pages[T]) -> AsyncIterator[T]:
        """As `Client.items`."""
        call = pages.first
        while True:
            items, following = await self.send(call)
            for item in items:
                yield item
            if following is None:
                return
            call = pages.after(following)

    async def events(self, events: Events[T]) -> AsyncIterator[T]:
        """As `Client.events`."""
        async with aclosing(await self._open(events.call)) as response:
            events.check(response)
            lines = Lines()
            try:
                async for chunk in response.aiter_bytes():
                    for line in lines.of(chunk):
                        if (event := events.read(line)) is not None:
                            yield event
            except httpx.RequestError as error:
                raise domain_error(error) from None

    ready = method_of(routes.ready, send)
    methods = method_of(routes.methods, send)
    create_base = method_of(routes.create_base, send)
    base = method_of(routes.base, send)
    share_base = method_of(routes.share_base, send)
    bases = method_of(routes.bases, items)
    delete_base = method_of(routes.delete_base, send)
    restore_base = method_of(routes.restore_base, send)
    create_delta = method_of(routes.create_delta, send)
    preview = method_of(routes.preview, send)
    delta = method_of(routes.delta, send)
    resolve = method_of(routes.resolve, send)
    deltas = method_of(routes.deltas, items)
    report = method_of(routes.report, send)
    delete = method_of(routes.delete, send)
    restore = method_of(routes.restore, send)
    models = method_of(routes.models, items)
    model = method_of(routes.model, send)
    change_model = method_of(routes.change_model, send)
    delete_model = method_of(routes.delete_model, send)
    move_alias = method_of(routes.move_alias, send)
    remove_alias = method_of(routes.remove_alias, send)
    alias_moves = method_of(routes.alias_moves, items)
    job = method_of(routes.job, send)
    jobs = method_of(routes.jobs, items)
    cancel = method_of(routes.cancel, send)
    retry = method_of(routes.retry, send)
    nodes = method_of(routes.nodes, send)
    drain = method_of(routes.drain, send)
    resume = method_of(routes.resume, send)
    evict = method_of(routes.evict, send)
    keys = method_of(routes.keys, items)
    create_key = method_of(routes.create_key, send)
    revoke_key = method_of(routes.revoke_key, send)
    rotate_key = method_of(routes.rotate_key, send)
    webhooks = method_of(routes.webhooks, send)
    create_webhook = method_of(routes.create_webhook, send)
    delete_webhook = method_of(routes.delete_webhook, send)
    webhook_messages = method_of(routes.webhook_messages, items)
    resend_message = method_of(routes.resend_message, send)
    tenants = method_of(routes.tenants, items)
    tenant = method_of(routes.tenant, send)
    create_tenant = method_of(routes.create_tenant, send)
    change_tenant = method_of(routes.change_tenant, send)
    check_served = method_of(routes.check_served, send)
    generate = method_of(routes.generate, send)
    stream = method_of(routes.stream, events)

    async def _open(self, call: Call[Any]) -> httpx.Response:
        for attempt in count(1):
            try:
                request = self._http.build_request(**call.arguments())
                response = await self._http.send(request, stream=True)
                if not response.is_success:
                    async with aclosing(response):
                        await response.aread()
                    check(response)
                return response  # noqa: TRY300
            except (httpx.RequestError, Unavailable) as error:
                await anyio.sleep(call.pause(attempt, error))
        raise AssertionError

    async def follow(self, job: str) -> AsyncIterator[Job]:
        """As `Client.follow`."""
        failures = 0
        while failures < RECONNECTS:
            try:
                async for state in self.events(routes.events(job)):
                    failures = 0
                    yield state
                    if state.is_final:
                        return
            except Unavailable:
                if failures == RECONNECTS - 1:
                    raise
            failures += 1
            await anyio.sleep(POLL_SECONDS)
        raise Unavailable(f"The server ends the events of {job} before the job has ended.")

    async def wait(self, job: str, progress: JobProgress = ignore) -> Job:
        """As `Client.wait`."""
        async for state in self.follow(job):
            progress(state)
        return state

    async def log(
        self, job: str, *, follow: bool = False, progress: JobProgress = ignore
    ) -> AsyncIterator[LogLine]:
        """As `Client.log`."""
        after, ended = 0, not follow
        while True:
            if follow:
                state = await self.job(job)
                progress(state)
                ended = state.is_final
            while lines := await self.send(routes.log(job, after)):
                for line in lines:
                    yield line
                after = lines[-1].id
            if ended:
                return
            await anyio.sleep(POLL_SECONDS)

    upload_folder = _in_thread(Client.upload_folder)
    upload_calibration = _in_thread(Client.upload_calibration)
    download = _in_thread(Client.download)
    push = _pushing(_in_thread(Client.push))


class AsyncPush:
    """As `Push`."""

    def __init__(self, client: AsyncClient, delta: Delta, job: Job) -> None:
        self.delta = delta
        self.job = job
        self._client = client

    __repr__ = Push.__repr__
    _repr_html_ = Push._repr_html_

    async def wait(self, progress: JobProgress | None = None) -> Delta:
        """As `Push.wait`."""
        with default_bar(progress) as show:
            self.job = await self._client.wait(self.job.id, show)
        if (failure := self.job.failure) is not None:
            raise failure
        self.delta = await self._client.delta(self.delta.id)
        return self.delta
