"""The way of a delta: blob store, local disk, host memory, device slot.

Each tier keeps what was used last, under a limit of its own. Loads run beside decoding: reading and
hashing in one pair of threads, placing on the device in another, so that a slow blob store holds up
neither the event loop nor a delta that is in memory already.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, Literal, NamedTuple, TypeVar

import torch

from deltadock.errors import Conflict, DeltadockError, InferenceFailed, NotFound, Unavailable
from deltadock.inference.deltas.disk import DiskTier
from deltadock.inference.deltas.host import HostTier
from deltadock.inference.deltas.reading import HostDelta, PlacedDelta
from deltadock.inference.deltas.slots import SlotManager
from deltadock.inference.metrics import Metrics

logger = logging.getLogger(__name__)

READS_AT_ONCE: Final = 2

Result = TypeVar("Result")
Tier = Literal["disk", "host", "device"]


class Held(NamedTuple):
    """A delta in the fastest tier that has it."""

    digest: str
    tier: Tier
    bytes: int
    references: int = 0
    """Requests that run on it."""
    pinned: bool = False


class DeltaStore:
    """One base's deltas in every tier. Belongs to one event loop."""

    def __init__(
        self,
        disk: DiskTier,
        *,
        host_bytes: int,
        slots: int,
        read: Callable[[str], HostDelta],
        place: Callable[[int, HostDelta], None],
        remove: Callable[[int], None],
        merge: Callable[[int], None],
        merged_slot: Callable[[], int | None],
        metrics: Metrics,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """Make empty tiers over `disk`, whose files outlive a base.

        Args:
            disk: the files, shared by all bases that the node serves in turn.
            host_bytes: limit of the host tier.
            slots: device slots.
            read: an artifact's delta in host memory; blocks.
            place: put a delta into a slot, which is empty; blocks.
            remove: empty a slot; blocks.
            merge: give merged weights to a slot, until it is emptied; blocks.
            merged_slot: the slot that has them.
            metrics: where times are told.
            changed: called whenever another delta is in a slot.
        """
        self.disk = disk
        self.host = HostTier[HostDelta](host_bytes, self._read_beside)
        self.slots = SlotManager[PlacedDelta](slots, fill=self._fill, clear=self._clear)
        self._readers = ThreadPoolExecutor(READS_AT_ONCE, "read-delta")
        # One thread: whoever fills a slot has the device's tables to itself.
        self._placer = ThreadPoolExecutor(1, "place-delta")
        self._read, self._place, self._remove = read, place, remove
        self._merge, self._merged_slot = merge, merged_slot
        self._metrics = metrics
        self._changed = changed

    async def acquire(self, digest: str) -> tuple[int, PlacedDelta]:
        """The slot that has the delta until `release`, and the delta.

        It is read before another delta leaves its slot for it; while all slots are in use, it
        waits in host memory, as long as it may.

        Raises:
            NotFound, HashMismatch, InvalidArtifact, BaseMismatch and the like: of this delta.
            Unavailable: there is no memory for it now.
        """
        if digest not in self.slots.residents:
            async with self.host.hold(digest):
                if not self.slots.full:
                    return await self.slots.acquire(digest)
        return await self.slots.acquire(digest)

    def release(self, digest: str) -> None:
        """Give back what `acquire` gave."""
        self.slots.release(digest)

    async def load(self, digest: str, tier: Tier = "device") -> None:
        """Bring a delta as far as `tier` and let it stay as long as it may; raises as `acquire`."""
        if tier == "disk":
            await self._run(self._readers, partial(_touch, self.disk, digest))
        elif tier == "host":
            await self.host.prefetch(digest)
        else:
            await self.acquire(digest)
            self.release(digest)

    async def unload(self, digest: str) -> None:
        """Take a delta out of its slot and host memory; its file goes when room is needed.

        Raises:
            NotFound: no tier has it.
            Conflict: it is pinned or in use.
        """
        self.find(digest)
        await self.slots.drop(digest)
        if not self.host.drop(digest):
            raise Conflict(f"The delta {digest} is being placed.")
        self._changed()

    async def pin(self, digest: str) -> None:
        """Bring a delta into a slot and keep it there until `unpin`; raises as `acquire`.

        Raises:
            Conflict: no slot would be left for the others.
        """
        await self.acquire(digest)
        try:
            self.slots.pin(digest)
        finally:
            self.release(digest)
        self._changed()

    def unpin(self, digest: str) -> None:
        """Let a delta leave again; raises NotFound if no tier has it."""
        self.find(digest)
        self.slots.unpin(digest)
        self._changed()

    @property
    def merged(self) -> str | None:
        """The delta that has merged weights."""
        slot = self._merged_slot()
        for digest, found in self.slots.residents.items():
            if found.slot == slot and found.loading.done():
                return digest
        return None

    async def merge(self, digest: str) -> None:
        """Bring a delta into a slot and merge its weights; whatever had merged weights leaves its
        slot for that. Raises as `acquire`.

        Raises:
            Conflict: the other is in use or pinned.
        """
        if self.merged == digest:
            return
        slot, _ = await self.acquire(digest)
        try:
            if (merged := self.merged) is not None:
                await self.slots.drop(merged)
            await self._run(self._placer, partial(self._merge, slot))
        finally:
            self.release(digest)

    def held(self) -> list[Held]:
        """Every delta of every tier, in its fastest one; fast tiers first, last used first."""
        found: dict[str, Held] = {}
        for digest, resident in self.slots.residents.items():
            there = resident.loading.done() and not resident.leaving
            delta = resident.loading.result() if there else None
            if delta is not None:
                found[digest] = Held(
                    digest, "device", delta.nbytes, resident.references, resident.pinned
                )
        tiers: tuple[tuple[Tier, Mapping[str, int]], ...] = (
            ("host", self.host.held()),
            ("disk", self.disk.held()),
        )
        ordered = list(reversed(found.values()))
        for tier, held in tiers:
            ordered += [
                Held(digest, tier, size)
                for digest, size in reversed([*held.items()])
                if digest not in found
            ]
            found |= {held.digest: held for held in ordered}
        return ordered

    def find(self, digest: str) -> Held:
        """One of them.

        Raises:
            NotFound: no tier has it.
        """
        for held in self.held():
            if held.digest == digest:
                return held
        raise NotFound(f"The node does not hold the delta {digest}.")

    def close(self) -> None:
        """Let the threads go; nothing may be loading."""
        self._readers.shutdown(wait=False)
        self._placer.shutdown(wait=False)

    async def _read_beside(self, digest: str) -> HostDelta:
        with self._metrics.load_seconds.labels("host").time():
            return await self._run(self._readers, partial(self._read, digest))

    async def _fill(self, slot: int, digest: str) -> PlacedDelta:
        async with self.host.hold(digest) as delta:
            with self._metrics.load_seconds.labels("device").time():
                await self._run(self._placer, partial(self._replace, slot, delta))
            placed = PlacedDelta(delta.tokenizer, delta.nbytes)
        self._changed()
        return placed

    def _replace(self, slot: int, delta: HostDelta) -> None:
        self._remove(slot)
        self._place(slot, delta)

    async def _clear(self, slot: int) -> None:
        await self._run(self._placer, partial(self._remove, slot))

    async def _run(self, threads: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        """What `work` returns; an error that is none of ours becomes one that tells the client.

        Raises:
            Unavailable: memory ran out, for this delta alone.
            InferenceFailed: something else that nobody expected.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, work)
        except DeltadockError:
            raise
        except Exception as error:
            logger.exception("A delta could not be loaded")
            if _is_out_of_memory(error):
                raise Unavailable(
                    "The node has no memory for the delta now. Try again, or lower "
                    "DELTADOCK_NODE_MAX_DELTAS or DELTADOCK_NODE_HOST_BYTES."
                ) from error
            raise InferenceFailed(f"The delta could not be loaded: {error}") from error


def _touch(disk: DiskTier, digest: str) -> None:
    with disk.open(digest):
        pass


def _is_out_of_memory(error: Exception) -> bool:
    # PyTorch's allocator for the CPU raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(
        error
    )
