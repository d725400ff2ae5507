"""One base's deltas, loaded through the tiers: blob store, local disk, host memory, device slot.

Loads run beside decoding: reading and hashing in one thread pool, placing on the device in another,
so that a slow blob store blocks neither the event loop nor a delta that is already in memory.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, NamedTuple, Protocol, TypeVar

import torch

from deltadock.errors import Conflict, DeltadockError, InferenceFailed, NotFound, Unavailable
from deltadock.inference.deltas.reading import HostDelta, PlacedDelta
from deltadock.inference.deltas.slots import SlotManager
from deltadock.inference.deltas.tiers import DiskTier, HostTier
from deltadock.inference.metrics import Metrics
from deltadock.model_target import Tier

log = logging.getLogger(__name__)

READER_THREADS: Final = 2

Result = TypeVar("Result")


class HeldDelta(NamedTuple):
    """A delta in the fastest tier that has it."""

    digest: str
    tier: Tier
    bytes: int
    references: int = 0
    """Requests that use it."""
    pinned: bool = False


class SlotDevice(Protocol):
    """Where deltas are read and installed, by threads; every method blocks."""

    @property
    def merged_slot(self) -> int | None:
        """The slot that has merged weights."""
        ...

    def read(self, digest: str) -> HostDelta:
        """Load an artifact's delta into host memory."""
        ...

    def place(self, slot: int, delta: HostDelta) -> None:
        """Install a delta in an empty slot."""
        ...

    def remove(self, slot: int) -> None:
        """Empty a slot."""
        ...

    def merge(self, slot: int) -> None:
        """Compute merged weights of a slot, kept until it is emptied."""
        ...


class DeltaStore:
    """One base's deltas in every tier. Belongs to one event loop."""

    def __init__(
        self,
        disk: DiskTier,
        device: SlotDevice,
        *,
        host_bytes: int,
        slots: int,
        metrics: Metrics,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """Create empty tiers above `disk`.

        Args:
            disk: artifact files, shared by all bases that the node serves one after another.
            device: has the slots.
            host_bytes: limit of the host tier.
            slots: how many the device has for deltas.
            metrics: receives load times.
            changed: called whenever the slots' contents change.
        """
        self.disk = disk
        self.host = HostTier[HostDelta](host_bytes, self._read_in_thread)
        self.slots = SlotManager[PlacedDelta](slots, fill=self._fill, clear=self._clear)
        self._readers = ThreadPoolExecutor(READER_THREADS, "read-delta")
        # One thread, so that installs never run concurrently on the device's tables.
        self._placer = ThreadPoolExecutor(1, "place-delta")
        self._device, self._metrics = device, metrics
        self._changed = changed

    async def acquire(self, digest: str, tenant: str | None = None) -> tuple[int, PlacedDelta]:
        """The delta's slot, kept until `release`, and the delta.

        It is read into host memory before a slot is evicted for it, and waits there while all
        slots are in use; tenants that wait take turns, and one with many leaves slots to others.

        Raises:
            NotFound, DamagedBlob, InvalidArtifact, BaseMismatch: this delta cannot be loaded.
            Unavailable: there is not enough memory now, or no slot for too long.
        """
        if digest not in self.slots.residents:
            async with self.host.hold(digest):
                if not self.slots.full:
                    return await self.slots.acquire(digest, tenant)
        return await self.slots.acquire(digest, tenant)

    def release(self, digest: str, tenant: str | None = None) -> None:
        """Undo one `acquire`."""
        self.slots.release(digest, tenant)

    async def load(self, digest: str, tier: Tier = "device") -> None:
        """Load a delta into `tier`, where it stays until evicted; raises as `acquire`."""
        if tier == "disk":
            await self._run(self._readers, partial(_fetch, self.disk, digest))
        elif tier == "host":
            await self.host.prefetch(digest)
        else:
            await self.acquire(digest)
            self.release(digest)

    async def unload(self, digest: str) -> None:
        """Remove a delta from its slot and host memory; its file stays on disk until evicted.

        Raises:
            NotFound: neither has it.
            Conflict: it is pinned or in use.
        """
        if self.find(digest).tier == "disk":
            raise NotFound(f"The node has the delta {digest} on disk only.")
        await self.slots.unload(digest)
        if not self.host.drop(digest):
            raise Conflict(f"The delta {digest} is being placed.")
        self._changed()

    async def pin(self, digest: str) -> None:
        """Load a delta into a slot and keep it there until `unpin`; raises as `acquire`.

        Raises:
            Conflict: no slot would be left for other deltas.
        """
        await self.acquire(digest)
        try:
            self.slots.pin(digest)
        finally:
            self.release(digest)
        self._changed()

    def unpin(self, digest: str) -> None:
        """Make a delta evictable again; raises NotFound if no tier has it."""
        self.find(digest)
        self.slots.unpin(digest)
        self._changed()

    @property
    def merged(self) -> str | None:
        """The delta that has merged weights."""
        slot = self._device.merged_slot
        for digest, resident in self.slots.residents.items():
            if resident.slot == slot and resident.loading.done():
                return digest
        return None

    async def merge(self, digest: str) -> None:
        """Load a delta into a slot and merge its weights; the delta merged before is unloaded.
        Raises as `acquire`.

        Raises:
            Conflict: the delta merged before is in use or pinned.
        """
        if self.merged == digest:
            return
        slot, _ = await self.acquire(digest)
        try:
            if (merged := self.merged) is not None:
                await self.slots.unload(merged)
            await self._run(self._placer, partial(self._device.merge, slot))
        finally:
            self.release(digest)

    def held(self) -> list[HeldDelta]:
        """Every delta in its fastest tier; fast tiers first, most recently used first."""
        listed: dict[str, HeldDelta] = {}
        for digest, resident in self.slots.residents.items():
            if resident.loading.done() and not resident.leaving:
                delta = resident.loading.result()
                listed[digest] = HeldDelta(
                    digest, "device", delta.nbytes, resident.users, resident.pinned
                )
        tiers: tuple[tuple[Tier, Mapping[str, int]], ...] = (
            ("host", self.host.held()),
            ("disk", self.disk.held()),
        )
        ordered = list(reversed(listed.values()))
        for tier, held in tiers:
            ordered += [
                HeldDelta(digest, tier, size)
                for digest, size in reversed([*held.items()])
                if digest not in listed
            ]
            listed |= {delta.digest: delta for delta in ordered}
        return ordered

    def find(self, digest: str) -> HeldDelta:
        """One delta in its fastest tier.

        Raises:
            NotFound: no tier has it.
        """
        for delta in self.held():
            if delta.digest == digest:
                return delta
        raise NotFound(f"The node does not hold the delta {digest}.")

    def close(self) -> None:
        """Shut the threads down; no load may be running."""
        self._readers.shutdown(wait=False)
        self._placer.shutdown(wait=False)

    async def _read_in_thread(self, digest: str) -> HostDelta:
        with self._metrics.load_seconds.labels("host").time():
            return await self._run(self._readers, partial(self._device.read, digest))

    async def _fill(self, slot: int, digest: str) -> PlacedDelta:
        async with self.host.hold(digest) as delta:
            with self._metrics.load_seconds.labels("device").time():
                await self._run(self._placer, partial(self._replace, slot, delta))
            placed = PlacedDelta(delta.tokenizer, delta.nbytes)
        self._changed()
        return placed

    def _replace(self, slot: int, delta: HostDelta) -> None:
        self._device.remove(slot)
        self._device.place(slot, delta)

    async def _clear(self, slot: int) -> None:
        await self._run(self._placer, partial(self._device.remove, slot))

    async def _run(self, threads: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        """Run `work` in a thread; errors other than DeltadockError become ones for the client.

        Raises:
            Unavailable: memory ran out.
            InferenceFailed: any other unexpected error.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, work)
        except DeltadockError:
            raise
        except Exception as error:
            log.exception("A delta could not be loaded")
            if _is_out_of_memory(error):
                raise Unavailable(
                    "The node has too little memory for the delta now. Try again, or lower "
                    "DELTADOCK_NODE_MAX_DELTAS or DELTADOCK_NODE_HOST_BYTES."
                ) from error
            raise InferenceFailed(f"The delta could not be loaded: {error}") from error


def _fetch(disk: DiskTier, digest: str) -> None:
    with disk.open(digest):
        pass


def _is_out_of_memory(error: Exception) -> bool:
    # PyTorch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(
        error
    )
