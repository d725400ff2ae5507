"""What arrives at once is bounded, for each tenant and for all."""

from contextlib import ExitStack

import pytest

from deltadock.api.uploads.arrivals import MEMORY_BYTES, Arrivals
from deltadock.errors import Unavailable

QUARTER = MEMORY_BYTES // 4


def test_a_tenant_holds_half_of_the_memory_and_leaves_the_rest_to_others() -> None:
    arrivals = Arrivals()
    with ExitStack() as bodies:
        for _ in range(2):
            bodies.enter_context(arrivals.memory("acme", QUARTER))
        with pytest.raises(Unavailable) as refused, arrivals.memory("acme", QUARTER):
            pass
        assert refused.value.headers == {"Retry-After": "5"}
        for _ in range(2):
            bodies.enter_context(arrivals.memory("other", QUARTER))
        bodies.enter_context(arrivals.memory("third", QUARTER))  # one is always taken
        with pytest.raises(Unavailable), arrivals.memory("third", 1):
            pass
    with arrivals.memory("acme", QUARTER), arrivals.memory("acme", QUARTER):
        pass
