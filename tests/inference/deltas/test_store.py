"""All tiers under any sequence of operations: limits hold, nothing leaks."""

import asyncio
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deltadock.errors import (
    Conflict,
    DamagedBlob,
    DeltadockError,
    InferenceFailed,
    NotFound,
    TooLarge,
    Unavailable,
)
from deltadock.inference.deltas.store import DeltaStore
from deltadock.inference.deltas.tiers import DiskTier
from deltadock.inference.metrics import Metrics
from deltadock.storage.blobs.local import LocalBlobStore
from deltadock.storage.cache import FileCache

SIZES = (10, 20, 30, 40, 60)


@dataclass
class Read:
    """A delta in host memory."""

    digest: str
    nbytes: int
    tokenizer: Any = None


class Site:
    """Tiers over real files; it is their device, too."""

    def __init__(self, folder: Path, *, disk: int, host: int, slots: int) -> None:
        self.blobs = LocalBlobStore(folder / "blobs")
        self.digests = [self.blobs.put_bytes(bytes([size]) * size) for size in SIZES]
        self.files = FileCache(self.blobs, folder / "cache")
        self.folder = folder / "cache" / "artifacts"
        self.device: dict[int, str] = {}
        self.merged_slot: int | None = None
        self.faults: Counter[str] = Counter()
        """How many of the next operations fail, by kind."""
        self.tiers = DeltaStore(
            DiskTier(self.files, disk),
            self,  # type: ignore[arg-type]
            host_bytes=host,
            slots=slots,
            metrics=Metrics(),
        )

    def read(self, digest: str) -> Read:
        with self.tiers.disk.open(digest) as path:
            self._fail("read", OSError("a bad sector"))
            return Read(digest, len(path.read_bytes()))

    def place(self, slot: int, delta: Read) -> None:
        assert slot not in self.device, "the slot was not empty"
        self.device[slot] = delta.digest
        self._fail("place", RuntimeError("half of it fits"))
        self._fail("memory", MemoryError())

    def remove(self, slot: int) -> None:
        self.device.pop(slot, None)
        self.merged_slot = None if self.merged_slot == slot else self.merged_slot

    def merge(self, slot: int) -> None:
        assert slot in self.device
        used = {found.slot for found in self.tiers.slots.residents.values()} - {slot}
        assert self.merged_slot not in used, "a request may be running on merged weights"
        self.merged_slot = None
        self._fail("merge", MemoryError())
        self.merged_slot = slot

    def _fail(self, kind: str, error: Exception) -> None:
        if self.faults[kind]:
            self.faults[kind] -= 1
            raise error

    def damage(self, digest: str) -> None:
        path = self.folder / f"{digest}.safetensors"
        if path.exists():
            path.unlink()  # it may be a hard link to its blob
            path.write_bytes(b"damaged")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path, disk=100, host=70, slots=2)
    yield site
    site.tiers.close()


def tier_of(site: Site, digest: str) -> str:
    return site.tiers.find(digest).tier


def test_a_delta_is_loaded_into_the_requested_tier(site: Site) -> None:
    first, second, third, *_ = site.digests

    async def scenario() -> None:
        await site.tiers.load(first, "disk")
        await site.tiers.load(second, "host")
        await site.tiers.load(third)
        assert [(held.digest, held.tier) for held in site.tiers.held()] == [
            (third, "device"), (second, "host"), (first, "disk"),
        ]  # fmt: skip
        await site.tiers.unload(third)
        assert tier_of(site, third) == "disk"
        assert site.device == {}
        with pytest.raises(NotFound):
            await site.tiers.unload("0" * 64)

    asyncio.run(scenario())


def test_an_error_fails_only_its_delta_and_is_cleaned_up(site: Site) -> None:
    good, bad, *_ = site.digests

    async def scenario() -> None:
        await site.tiers.load(good)
        cases: list[tuple[str, type[DeltadockError], str, str]] = [
            ("read", InferenceFailed, "a bad sector", "disk"),
            ("place", InferenceFailed, "half of it fits", "host"),
            ("memory", Unavailable, "too little memory", "host"),
        ]
        for kind, error, named, left in cases:
            site.faults[kind] = 1
            with pytest.raises(error, match=named):
                await site.tiers.load(bad)
            assert site.device == {1: good}
            assert tier_of(site, bad) == left
            await site.tiers.load(bad)
            assert tier_of(site, bad) == "device"
            await site.tiers.unload(bad)

    asyncio.run(scenario())


def test_one_delta_at_a_time_has_merged_weights(site: Site) -> None:
    first, second, third, *_ = site.digests

    async def scenario() -> None:
        await site.tiers.merge(first)
        await site.tiers.merge(first)
        assert site.tiers.merged == first
        await site.tiers.acquire(first)
        with pytest.raises(Conflict, match="used by 1"):
            await site.tiers.merge(second)
        site.tiers.release(first)
        assert site.tiers.merged == first
        site.faults["merge"] = 1
        with pytest.raises(Unavailable, match="too little memory"):
            await site.tiers.merge(second)
        assert site.tiers.merged is None
        assert tier_of(site, second) == "device", "it is served without merged weights"
        await site.tiers.merge(second)
        await site.tiers.load(first)
        await site.tiers.load(third)
        assert site.tiers.merged is None, "it left its slot"
        await site.tiers.merge(third)
        assert site.tiers.merged == third
        assert site.device[site.merged_slot or 0] == third

    asyncio.run(scenario())


def test_damaged_files_are_never_served(site: Site) -> None:
    first, second, *_ = site.digests

    async def scenario() -> None:
        await site.tiers.load(first, "disk")
        site.damage(first)
        await site.tiers.load(first)
        assert site.device == {1: first}, "the damaged file is fetched again"
        await site.tiers.load(second, "disk")
        site.damage(second)
        whole = site.blobs.path(second).read_bytes()
        site.blobs.path(second).unlink()
        site.blobs.path(second).write_bytes(b"damaged, too")
        with pytest.raises(DamagedBlob):
            await site.tiers.load(second)
        assert not list(site.folder.glob(f"*{second}*")), "nothing of it is cached"
        site.blobs.path(second).write_bytes(whole)
        await site.tiers.load(second)
        assert tier_of(site, second) == "device"

    asyncio.run(scenario())


def test_a_missing_delta_evicts_nothing(site: Site) -> None:
    async def scenario() -> None:
        for digest in site.digests[:2]:
            await site.tiers.load(digest)
        with pytest.raises(NotFound):
            await site.tiers.load("0" * 64)
        assert sorted(site.device.values()) == sorted(site.digests[:2])

    asyncio.run(scenario())


def test_the_disk_limit_holds_after_a_restart(tmp_path: Path) -> None:
    site = Site(tmp_path, disk=60, host=0, slots=1)

    async def scenario() -> None:
        for digest in site.digests:
            await site.tiers.load(digest)
        assert site.device == {1: site.digests[-1]}
        assert site.tiers.disk.held() == {site.digests[-1]: 60}
        assert site.tiers.host.nbytes == 0

    asyncio.run(scenario())
    site.tiers.close()
    assert DiskTier(site.files, 60).nbytes == 60
    smaller = DiskTier(site.files, 59)
    assert smaller.nbytes == 0
    with pytest.raises(TooLarge, match="DELTADOCK_NODE_DISK_BYTES"), smaller.open(site.digests[-1]):
        pass


class Users(RuleBasedStateMachine):
    """Requests, operator commands and failures in any order."""

    @initialize(disk=st.integers(60, 120), host=st.integers(0, 100), slots=st.integers(1, 3))
    def begin(self, disk: int, host: int, slots: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory()
        self.limits = (disk, host, slots)
        self.site = Site(Path(self.folder.name), disk=disk, host=host, slots=slots)
        self.waiting: list[tuple[str, asyncio.Task[Any]]] = []
        self.running: list[tuple[str, int]] = []

    def do(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run an operator's command; waiting requests keep waiting."""

        async def attempt() -> None:
            task = asyncio.ensure_future(work)
            await asyncio.wait({task}, timeout=0.02)  # a pin may wait for a slot indefinitely
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled() and (error := task.exception()):
                assert isinstance(error, DeltadockError), error

        self.loop.run_until_complete(attempt())
        self.settle()

    def call(self, function: Callable[[str], None], digest: str) -> None:
        """Call a function of the store in its loop."""

        async def called() -> None:
            function(digest)

        self.loop.run_until_complete(called())
        self.settle()

    def settle(self) -> None:
        """Let every load end, and record the requests that got a slot."""

        async def quiet() -> None:
            tiers = self.site.tiers
            while tasks := [
                *tiers.host._loading.values(),
                *(r.loading for r in tiers.slots.residents.values() if not r.loading.done()),
            ]:
                await asyncio.wait(tasks)
                await asyncio.sleep(0)
            for _ in range(5):
                await asyncio.sleep(0)

        self.loop.run_until_complete(quiet())
        for digest, task in [*self.waiting]:
            if task.done():
                self.waiting.remove((digest, task))
                if not task.cancelled() and task.exception() is None:
                    self.running.append((digest, task.result()[0]))
                elif not task.cancelled():
                    assert isinstance(task.exception(), DeltadockError)

    @rule(number=st.integers(0, len(SIZES) - 1), settles=st.booleans())
    def request(self, number: int, settles: bool) -> None:
        digest = self.site.digests[number]
        self.waiting.append(
            (digest, self.loop.create_task(self.site.tiers.acquire(digest, str(number % 2))))
        )
        if settles:
            self.settle()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end_a_request(self, data: st.DataObject) -> None:
        digest, _ = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.call(self.site.tiers.release, digest)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        _, task = self.waiting[data.draw(st.integers(0, len(self.waiting) - 1))]
        task.cancel()
        self.settle()

    @rule(number=st.integers(0, len(SIZES) - 1), tier=st.sampled_from(["disk", "host"]))
    def load(self, number: int, tier: Any) -> None:
        self.do(self.site.tiers.load(self.site.digests[number], tier))

    @rule(number=st.integers(0, len(SIZES) - 1))
    def merge(self, number: int) -> None:
        self.do(self.site.tiers.merge(self.site.digests[number]))

    @rule(number=st.integers(0, len(SIZES) - 1))
    def pin(self, number: int) -> None:
        self.do(self.site.tiers.pin(self.site.digests[number]))

    @rule(number=st.integers(0, len(SIZES) - 1))
    def unpin(self, number: int) -> None:
        with suppress(NotFound):
            self.call(self.site.tiers.unpin, self.site.digests[number])

    @rule(number=st.integers(0, len(SIZES) - 1))
    def unload(self, number: int) -> None:
        digest = self.site.digests[number]
        used = digest in {digest for digest, _ in self.running}
        self.do(self.site.tiers.unload(digest))
        assert not used or digest in self.site.device.values()

    @rule(kind=st.sampled_from(["read", "place", "memory", "merge"]))
    def break_something(self, kind: str) -> None:
        self.site.faults[kind] = 1

    @rule(number=st.integers(0, len(SIZES) - 1))
    def damage(self, number: int) -> None:
        self.site.damage(self.site.digests[number])

    @invariant()
    def limits_hold_and_nobody_loses_a_slot(self) -> None:
        disk, host, slots = self.limits
        tiers = self.site.tiers
        assert sum(path.stat().st_size for path in self.site.folder.glob("*")) <= disk
        used = sum(entry.delta.nbytes for entry in tiers.host._entries.values() if entry.users)
        assert tiers.host.nbytes <= max(host, used)
        assert len(self.site.device) <= slots
        for digest, slot in self.running:
            assert self.site.device[slot] == digest, "a slot in use was given away"
        merged = tiers.merged
        assert merged is None or self.site.device[self.site.merged_slot or 0] == merged
        pinned = [r for r in tiers.slots.residents.values() if r.pinned]
        assert len(pinned) < max(slots, 1)

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        self.settle()
        while self.waiting or self.running:
            while self.running:
                self.call(self.site.tiers.release, self.running.pop()[0])
            for _, task in self.waiting:
                task.cancel()
            self.settle()
        tiers = self.site.tiers
        residents = tiers.slots.residents
        assert all(resident.users == 0 for resident in residents.values())
        assert len(tiers.slots._free) + len(residents) == self.limits[2]
        assert sorted(self.site.device.values()) == sorted(residents)
        assert all(entry.users == 0 for entry in tiers.host._entries.values())
        assert all(file.users == 0 for file in tiers.disk._entries.values())
        self.site.faults.clear()
        for digest in self.site.digests:  # every delta can still be loaded
            if all(not resident.pinned for resident in residents.values()):
                self.loop.run_until_complete(tiers.load(digest))
        tiers.close()
        self.loop.close()
        self.folder.cleanup()


TestUsers = Users.TestCase
TestUsers.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
