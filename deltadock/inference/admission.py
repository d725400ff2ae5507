"""Admission control: limits on queued and running sequences, in total, per queue and per tenant.

A tenant's limit is proportional to the places that are free (dynamic thresholds: Choudhury and
Hahne, IEEE/ACM Transactions on Networking, 1998): it falls as a node fills, and whoever has some
never takes the last. Tenants that send all they can come to equal shares that leave places free as
what the first have taken ends; until then, later ones find few or none.
"""

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Final

from deltadock.errors import InvalidInput, Overloaded
from deltadock.model_target import ModelTarget

RECENT_ENDS: Final = 32
"""Ended sequences from which the throughput is estimated."""
MAX_RETRY_SECONDS: Final = 60
"""Upper bound of Retry-After, since load changes."""


class Admission:
    """Counts queued and running sequences. Belongs to one event loop."""

    def __init__(
        self,
        limit: int,
        delta_limit: int,
        reserve: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Admit `limit` sequences at once, `delta_limit` of them per queue key.

        A tenant that has some already leaves `reserve` of them to others.
        """
        self.limit, self._delta_limit = limit, min(delta_limit, limit)
        self._reserve = reserve
        self._clock = clock
        self._admitted: Counter[str] = Counter()
        """By queue key."""
        self._of_tenant: Counter[str | None] = Counter()
        self._ends: deque[float] = deque(maxlen=RECENT_ENDS)
        self._delta_ends: defaultdict[str, deque[float]] = defaultdict(
            lambda: deque(maxlen=RECENT_ENDS)
        )

    @property
    def admitted(self) -> int:
        """Queued and running sequences."""
        return self._admitted.total()

    def enter(self, target: ModelTarget, count: int) -> None:
        """Admit `count` sequences of a tenant and delta.

        Raises:
            InvalidInput: more than the limit per delta.
            Overloaded: a queue is full; the detail `retry_after` estimates the seconds until there
                is room, from the recent throughput.
        """
        if count > self._delta_limit:
            raise InvalidInput(
                f"The request asks for {count} answers; this node runs at most "
                f"{self._delta_limit} of one delta at once."
            )
        free = self.limit - self.admitted - count
        if free < 0:
            raise Overloaded(
                "The node's queue is full; try again later.",
                retry_after=self._seconds(self._ends, -free),
            )
        excess = self._admitted[target.queue_key] + count - self._delta_limit
        if excess > 0:
            raise Overloaded(
                "The queue of this delta is full; try again later.",
                retry_after=self._seconds(self._delta_ends[target.queue_key], excess),
            )
        share = (
            (self.limit - self._reserve) * free // self._reserve if self._reserve else self.limit
        )
        held = self._of_tenant[target.tenant]
        if held and held + count > share:
            raise Overloaded(
                "Your requests take all of this node's queue but what is kept for other tenants; "
                "try again later.",
                retry_after=self._seconds(self._ends, held + count - share),
            )
        self._admitted[target.queue_key] += count
        self._of_tenant[target.tenant] += count

    def leave(self, target: ModelTarget, count: int = 1) -> None:
        """Remove ended sequences."""
        queue_key = target.queue_key
        self._admitted[queue_key] -= count
        self._of_tenant[target.tenant] -= count
        if not self._of_tenant[target.tenant]:
            del self._of_tenant[target.tenant]
        now = self._clock()
        self._ends.extend([now] * count)
        if self._admitted[queue_key] > 0:
            self._delta_ends[queue_key].extend([now] * count)
        else:
            del self._admitted[queue_key]
            self._delta_ends.pop(queue_key, None)

    def _seconds(self, ends: deque[float], excess: int) -> int:
        """Estimated seconds until `excess` sequences have ended; 1 without an estimate."""
        if len(ends) < 2:
            return 1
        interval = (self._clock() - ends[0]) / (len(ends) - 1)
        return min(max(math.ceil(excess * interval), 1), MAX_RETRY_SECONDS)
