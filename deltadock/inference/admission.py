"""Bounded queues: how many sequences a node takes on, in all and of one delta."""

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Final

from deltadock.errors import InvalidInput, Overloaded

RECENT: Final = 32
"""Sequences whose ends tell how fast places become free."""
LONGEST_SECONDS: Final = 60
"""A client is never told to wait longer: loads change."""


class Admission:
    """Counts the sequences that wait or run. Belongs to one event loop."""

    def __init__(
        self, limit: int, delta_limit: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Take `limit` sequences at once, `delta_limit` of them of the same model."""
        self.limit, self._delta_limit = limit, min(delta_limit, limit)
        self._clock = clock
        self._admitted: Counter[str] = Counter()
        self._ends: deque[float] = deque(maxlen=RECENT)
        self._delta_ends: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))

    @property
    def admitted(self) -> int:
        """Sequences that wait or run."""
        return self._admitted.total()

    def enter(self, model_key: str, count: int) -> None:
        """Take on `count` sequences of the model with this key.

        Raises:
            InvalidInput: so many never fit.
            Overloaded: they do not fit now; the detail `retry_after` says in how many seconds they
                should, as fast as sequences have been ending lately.
        """
        if count > self._delta_limit:
            raise InvalidInput(
                f"The request asks for {count} answers; this node takes {self._delta_limit} of one "
                "delta at once."
            )
        excess = self.admitted + count - self.limit
        if excess > 0:
            raise Overloaded(
                "The node's queue is full; try again later.",
                retry_after=self._seconds(self._ends, excess),
            )
        excess = self._admitted[model_key] + count - self._delta_limit
        if excess > 0:
            raise Overloaded(
                "The queue of this delta is full; try again later.",
                retry_after=self._seconds(self._delta_ends[model_key], excess),
            )
        self._admitted[model_key] += count

    def leave(self, model_key: str, count: int = 1) -> None:
        """So many sequences have ended."""
        self._admitted[model_key] -= count
        now = self._clock()
        self._ends.extend([now] * count)
        if self._admitted[model_key] > 0:
            self._delta_ends[model_key].extend([now] * count)
        else:
            del self._admitted[model_key]
            self._delta_ends.pop(model_key, None)

    def _seconds(self, ends: deque[float], excess: int) -> int:
        """When `excess` more sequences will have ended; a second if nothing is known yet."""
        if len(ends) < 2:
            return 1
        each = (self._clock() - ends[0]) / (len(ends) - 1)
        return min(max(math.ceil(excess * each), 1), LONGEST_SECONDS)
