"""Admission control: limits on queued and running sequences, in total and per queue."""

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Final

from deltadock.errors import InvalidInput, Overloaded

RECENT_ENDS: Final = 32
"""Ended sequences from which the throughput is estimated."""
MAX_RETRY_SECONDS: Final = 60
"""Upper bound of Retry-After, since load changes."""


class Admission:
    """Counts queued and running sequences. Belongs to one event loop."""

    def __init__(
        self, limit: int, delta_limit: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Admit `limit` sequences at once, `delta_limit` of them per queue key."""
        self.limit, self._delta_limit = limit, min(delta_limit, limit)
        self._clock = clock
        self._admitted: Counter[str] = Counter()
        self._ends: deque[float] = deque(maxlen=RECENT_ENDS)
        self._delta_ends: defaultdict[str, deque[float]] = defaultdict(
            lambda: deque(maxlen=RECENT_ENDS)
        )

    @property
    def admitted(self) -> int:
        """Queued and running sequences."""
        return self._admitted.total()

    def enter(self, queue_key: str, count: int) -> None:
        """Admit `count` sequences of a queue key.

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
        excess = self.admitted + count - self.limit
        if excess > 0:
            raise Overloaded(
                "The node's queue is full; try again later.",
                retry_after=self._seconds(self._ends, excess),
            )
        excess = self._admitted[queue_key] + count - self._delta_limit
        if excess > 0:
            raise Overloaded(
                "The queue of this delta is full; try again later.",
                retry_after=self._seconds(self._delta_ends[queue_key], excess),
            )
        self._admitted[queue_key] += count

    def leave(self, queue_key: str, count: int = 1) -> None:
        """Remove ended sequences."""
        self._admitted[queue_key] -= count
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
