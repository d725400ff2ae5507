"""Registers the node with the api: heartbeats with its address, deltas and load."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

import httpx
import structlog

from deltadock.settings import Settings
from deltadock.storage.ids import new_id
from deltadock.trust import credentials

log = structlog.get_logger(__name__)

MISSED_BEATS: Final = 5
"""The registration expires after this many missed heartbeats."""
MAX_DAMAGED: Final = 100
"""Damaged blobs in one heartbeat."""
MIN_INTERVAL_SECONDS: Final = 0.1
"""Minimum time between heartbeats, however often the state changes."""


def _reason(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        response = error.response
        if response.status_code == httpx.codes.UNAUTHORIZED:
            return "The api has another DELTADOCK_NODE_SECRET; start the node with the api's."
        return f"The api answered {response.status_code}: {response.text[:500]}"
    return repr(error)


class Registration:
    """Sends heartbeats to the api until closed. Belongs to one event loop.

    If the api does not answer, the node keeps serving and retries.
    """

    def __init__(
        self, settings: Settings, url: str, state: Callable[[], Mapping[str, Any]]
    ) -> None:
        """`state` returns what a heartbeat reports besides the node's address."""
        assert settings.api_url is not None
        self.id = new_id("node")
        self._node_url = f"{settings.api_url.rstrip('/')}/v1/nodes/{self.id}"
        self._interval = settings.node_heartbeat_seconds
        self._address = {"url": url, "lives_seconds": self._interval * MISSED_BEATS}
        self._state = state
        self._damaged: set[str] = set()
        """Damaged blobs that no successful heartbeat has reported."""
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._registered: bool | None = None
        """Whether the last heartbeat succeeded; None before the first."""
        self._http = httpx.AsyncClient(
            headers=credentials(settings.node_secret), timeout=5.0, trust_env=False
        )
        self._heartbeats = asyncio.create_task(self._send_heartbeats())

    def notify(self) -> None:
        """Send a heartbeat soon, since the state has changed."""
        self._changed.set()

    def report_damaged(self, digest: str) -> None:
        """Report soon, and once, that the store has a damaged blob. Called from any thread."""

        def add() -> None:
            self._damaged.add(digest)
            self.notify()

        self._loop.call_soon_threadsafe(add)

    async def report(self) -> None:
        """Send a heartbeat now."""
        self._changed.clear()
        damaged = sorted(self._damaged)[:MAX_DAMAGED]
        body = {**self._address, **self._state(), "damaged": damaged}
        try:
            response = await self._http.put(self._node_url, json=body)
            response.raise_for_status()
        except httpx.HTTPError as error:
            if self._registered is not False:
                log.warning("not_registered", url=self._node_url, error=_reason(error))
            self._registered = False
        else:
            if not self._registered:
                log.info("registered", url=self._node_url)
            self._registered = True
            self._damaged.difference_update(damaged)

    async def _send_heartbeats(self) -> None:
        while True:
            try:
                await self.report()
            except Exception:
                # Without heartbeats the api would forget a node that still serves.
                log.exception("heartbeat_failed", url=self._node_url)
            await asyncio.sleep(MIN_INTERVAL_SECONDS)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._interval - MIN_INTERVAL_SECONDS)

    async def close(self) -> None:
        """Deregister and stop."""
        self._heartbeats.cancel()
        with suppress(httpx.HTTPError):
            await self._http.delete(self._node_url, timeout=2.0)
        await self._http.aclose()
