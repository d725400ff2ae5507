"""What is arriving through this process and not stored yet, by tenant."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from deltadock.api.quotas import Room
from deltadock.errors import Unavailable

MEMORY_BYTES: Final = 512 << 20
"""For bodies that are held in memory until they are whole, of all tenants."""
TENANT_SHARE: Final = 0.5
"""Of that, for one tenant."""
RETRY_SECONDS: Final = 5

FileKey = tuple[str, str]
"""An upload's id and a path in it."""


class Arrivals:
    """Changed by the event loop alone."""

    def __init__(self) -> None:
        self._staged: Counter[str] = Counter()
        self._arriving: Counter[FileKey] = Counter()
        self._held: Counter[str] = Counter()

    def staged(self, tenant_id: str) -> int:
        """Bytes that have arrived of the tenant's whole files, beyond those announced."""
        return self._staged[tenant_id]

    def covered(self, key: FileKey, announced: int) -> int:
        """How many bytes of the file's next body its announcement covers.

        It is counted once, and so covers one body at a time.
        """
        return 0 if self._arriving[key] else announced

    @contextmanager
    def file(
        self, tenant_id: str, key: FileKey, room: Room | None, announced: int
    ) -> Iterator[Callable[[int], None]]:
        """Count a whole file while the block runs: yields what is told how much of it has arrived.

        That raises QuotaExceeded if the tenant has no room for all its files that are arriving.
        Of each, what `room` counts as announced does not count again.
        """
        covered = self.covered(key, announced)
        own = 0

        def arrived(size: int) -> None:
            nonlocal own
            more = max(0, size - covered)
            self._staged[tenant_id] += more - own
            own = more
            if room is not None:
                room.check(self._staged[tenant_id])

        self._arriving[key] += 1
        try:
            yield arrived
        finally:
            self._arriving[key] -= 1
            self._arriving += Counter()
            self._staged[tenant_id] -= own
            self._staged += Counter()  # forgets who has none

    @contextmanager
    def memory(self, tenant_id: str, size: int) -> Iterator[None]:
        """Hold so many bytes in memory while the block runs.

        Raises:
            Unavailable: bodies that arrive hold too much. A tenant that has none may always send
                one, however much the others hold.
        """
        own = self._held[tenant_id]
        is_full = self._held.total() + size > MEMORY_BYTES
        if own and (is_full or own + size > TENANT_SHARE * MEMORY_BYTES):
            raise Unavailable(
                "Too many bodies arrive at once for this process's memory. Send it again when "
                "others have arrived.",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        self._held[tenant_id] += size
        try:
            yield
        finally:
            self._held[tenant_id] -= size
            self._held += Counter()
