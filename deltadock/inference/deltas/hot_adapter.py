"""The delta that takes most of the traffic runs on merged weights where it is alone in a pass."""

import asyncio
import logging
import time
from typing import Final, Protocol

from deltadock.errors import Conflict, DeltadockError

logger = logging.getLogger(__name__)

WINDOW_TOKENS: Final = 50_000
"""Once so many tokens have been counted, all counts are halved."""
LEAST_TOKENS: Final = 10_000
"""Before so many there is no favourite."""
SHARE: Final = 0.75
"""Part of all tokens that a favourite has; below it, others are in most of its passes."""


REST_SECONDS: Final = 600.0
"""A merge that failed, for want of memory say, is not tried again before that."""


class TrafficShares:
    """Tokens by weights, the recent ones counting most."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}

    def add(self, weights: str, tokens: int) -> None:
        """So many tokens, read or generated, have been computed."""
        self._tokens[weights] = self._tokens.get(weights, 0) + tokens
        if sum(self._tokens.values()) > WINDOW_TOKENS:
            halved = {name: count // 2 for name, count in self._tokens.items()}
            self._tokens = {name: count for name, count in halved.items() if count}

    @property
    def favourite(self) -> str | None:
        """The weights with `SHARE` of the traffic, if any have."""
        total = sum(self._tokens.values())
        most = max(self._tokens, key=self._tokens.__getitem__, default=None)
        if most is None or total < LEAST_TOKENS or self._tokens[most] < SHARE * total:
            return None
        return most


class Merges(Protocol):
    """What can merge a delta; see `ServedBase`."""

    @property
    def merged(self) -> str | None:
        """The delta that has merged weights."""

    async def merge(self, digest: str) -> None:
        """Give them to another."""


class Favourite:
    """Merges the favourite among deltas. Belongs to one event loop."""

    def __init__(self, merges: Merges, base: str) -> None:
        """`base` is what the bare base's traffic is counted under."""
        self._merges, self._base = merges, base
        self._traffic = TrafficShares()
        self._rests: dict[str, float] = {}
        """When (seconds of the monotonic clock) one that failed may be tried again."""
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def served(self, weights: str, tokens: int) -> None:
        """A request has ended that computed so many tokens; this may begin a merge."""
        self._traffic.add(weights, tokens)
        found = self._traffic.favourite
        if found is None or found in {self._base, self._merges.merged}:
            return
        rested = time.monotonic() >= self._rests.get(found, 0.0)
        if rested and not self._stopped and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._merge(found))

    def stop(self) -> None:
        """Begin nothing more."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()

    async def _merge(self, digest: str) -> None:
        try:
            await self._merges.merge(digest)
        except Conflict:
            return  # the last favourite is still in use: the next request tries again
        except DeltadockError:
            logger.exception("The delta %s takes most of the traffic but cannot be merged", digest)
            self._rests[digest] = time.monotonic() + REST_SECONDS
        else:
            logger.info("Merged the delta %s, which takes most of the traffic", digest)
