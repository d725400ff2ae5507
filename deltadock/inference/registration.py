"""Telling the api of this node: where it is, what it holds, how busy it is."""

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
"""A node that was silent for so many heartbeats is gone."""
QUICKEST_SECONDS: Final = 0.1
"""Between two heartbeats, however fast things change."""


def _reason(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        answer = error.response
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            return "The api has another DELTADOCK_NODE_SECRET; start the node with the api's."
        return f"The api answered {answer.status_code}: {answer.text[:500]}"
    return repr(error)


class Registration:
    """Heartbeats to the api until it is closed. Belongs to one event loop.

    An api that does not answer is no fault of the node's: it serves on, and tells again.
    """

    def __init__(
        self, settings: Settings, url: str, state: Callable[[], Mapping[str, Any]]
    ) -> None:
        """`state` gives what the api is told of the node, besides where it is."""
        assert settings.api_url is not None
        self.id = new_id("node")
        self._place = f"{settings.api_url.rstrip('/')}/v1/nodes/{self.id}"
        self._every = settings.node_heartbeat_seconds
        self._constant = {"url": url, "lives_seconds": self._every * MISSED_BEATS}
        self._state = state
        self._changed = asyncio.Event()
        self._known: bool | None = None
        """Whether the api heard of us last time; None before the first."""
        self._http = httpx.AsyncClient(
            headers=credentials(settings.node_secret), timeout=5.0, trust_env=False
        )
        self._beating = asyncio.create_task(self._beat())

    def changed(self) -> None:
        """Tell the api soon: what the node holds is no longer what it was told."""
        self._changed.set()

    async def tell(self) -> None:
        """Tell the api now."""
        self._changed.clear()
        try:
            answer = await self._http.put(self._place, json={**self._constant, **self._state()})
            answer.raise_for_status()
        except httpx.HTTPError as error:
            if self._known is not False:
                log.warning("not_registered", url=self._place, error=_reason(error))
            self._known = False
        else:
            if not self._known:
                log.info("registered", url=self._place)
            self._known = True

    async def _beat(self) -> None:
        while True:
            await self.tell()
            await asyncio.sleep(QUICKEST_SECONDS)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._every - QUICKEST_SECONDS)

    async def close(self) -> None:
        """Leave: the api forgets the node at once."""
        self._beating.cancel()
        with suppress(httpx.HTTPError):
            await self._http.delete(self._place, timeout=2.0)
        await self._http.aclose()
