"""Merges the hot delta: the delta with most of the traffic, where it is alone in a pass."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from deltadock.errors import Conflict, DeltadockError

log = logging.getLogger(__name__)

WINDOW_TOKENS: Final = 50_000
"""When this many tokens have been counted, all counts are halved."""
MIN_TOKENS: Final = 10_000
"""Fewer counted tokens name no hot delta."""
HOT_FRACTION: Final = 0.75
"""Fraction of all tokens that makes a delta hot; below, most of its passes have other rows."""
RETRY_SECONDS: Final = 600.0
"""Time until a failed merge, for lack of memory for example, is retried."""


class TrafficShares:
    """Tokens per model key, weighted towards recent ones."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}

    def add(self, model_key: str, tokens: int) -> None:
        """Count prompt and output tokens that have been computed."""
        self._tokens[model_key] = self._tokens.get(model_key, 0) + tokens
        if sum(self._tokens.values()) > WINDOW_TOKENS:
            halved = {key: count // 2 for key, count in self._tokens.items()}
            self._tokens = {key: count for key, count in halved.items() if count}

    @property
    def hot(self) -> str | None:
        """The model key with `HOT_FRACTION` of the traffic, if there is one."""
        total = sum(self._tokens.values())
        most = max(self._tokens, key=self._tokens.__getitem__, default=None)
        if most is None or total < MIN_TOKENS or self._tokens[most] < HOT_FRACTION * total:
            return None
        return most


class HotDeltaMerger:
    """Merges the hot delta in the background. Belongs to one event loop."""

    def __init__(
        self,
        base: str,
        merge: Callable[[str], Awaitable[None]],
        merged: Callable[[], str | None],
    ) -> None:
        """Watch the traffic.

        Args:
            base: the bare base's model key, which is never merged.
            merge: compute a delta's merged weights.
            merged: the delta that has merged weights.
        """
        self._base, self._merge, self._merged = base, merge, merged
        self._traffic = TrafficShares()
        self._retry_at: dict[str, float] = {}
        """Monotonic seconds before which a failed merge is not retried."""
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def record(self, model_key: str, tokens: int) -> None:
        """Count an ended request's tokens; may start a merge."""
        self._traffic.add(model_key, tokens)
        hot = self._traffic.hot
        if hot is None or hot in {self._base, self._merged()}:
            return
        due = time.monotonic() >= self._retry_at.get(hot, 0.0)
        if due and not self._stopped and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._run(hot))

    def stop(self) -> None:
        """Cancel a running merge and start no more."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()

    async def _run(self, digest: str) -> None:
        try:
            await self._merge(digest)
        except Conflict:
            return  # the previous hot delta is in use: the next request retries
        except DeltadockError:
            log.exception("The hot delta %s cannot be merged", digest)
            self._retry_at[digest] = time.monotonic() + RETRY_SECONDS
        else:
            log.info("Merged the hot delta %s", digest)
