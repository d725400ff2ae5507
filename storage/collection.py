"""Collection of bytes that nothing needs any more, totals of what is stored, and reconciliation.

Collection goes in four steps: the rules drop fine-tunes and texts; deltas that were deleted some
days ago are given up; then the saved blocks of ended jobs and the blobs that no row needs are
removed. Every step is in transactions of its own and safe beside pushes of the same bytes (see
`BlobRepository`), so that several processes may collect at once.
"""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from typing import Final, NamedTuple, TypeVar

import structlog
from sqlalchemy.orm import Session

from deltadock.settings import Settings
from deltadock.storage.blobs import BlobStore, StoredEntry
from deltadock.storage.database import Database, database_now
from deltadock.storage.models import AuditAction, DeltaRow
from deltadock.storage.repositories.audit import record_each
from deltadock.storage.repositories.blobs import BlobKind, BlobRepository, lock_blobs
from deltadock.storage.repositories.retention import DropLimits, DroppableUploads, Rule
from deltadock.storage.repositories.tenants import TenantRepository
from deltadock.storage.repositories.totals import TotalsRepository
from deltadock.storage.repositories.uploads import UploadRepository
from deltadock.storage.tenancy import LOCAL_TENANT

log = structlog.get_logger(__name__)

WORK: Final = "work"
"""The kind of jobs' saved blocks."""
YOUNG: Final = timedelta(hours=1)
"""Blobs younger than this are left alone: their rows may be yet to come."""
BATCH: Final = 500
REMOVED_AT_ONCE: Final = 200
"""Blobs, in one transaction: each is locked, and on SQLite no other writes meanwhile."""
HOLD_SECONDS: Final = 0.1
"""How long a transaction of many changes may keep others waiting."""
PAUSE_SECONDS: Final = 0.1
"""Who waits for SQLite's lock looks for it at least so often."""

Item = TypeVar("Item")


class Usage(NamedTuple):
    """A number of stored files, and their bytes."""

    files: int
    bytes: int

    def plus(self, size: int) -> "Usage":
        """With one file of `size` bytes more."""
        return Usage(self.files + 1, self.bytes + size)


UsageByKind = dict[str, Usage]


@dataclass(slots=True)
class Collected:
    """What was removed, or would be: usage by kind; and why other bytes stay, in words."""

    usage: UsageByKind = field(default_factory=lambda: defaultdict(lambda: Usage(0, 0)))
    blocked: list[str] = field(default_factory=list)

    def count(self, kind: str, entry: StoredEntry) -> None:
        """Count one more file."""
        self.usage[kind] = self.usage[kind].plus(entry.bytes)

    @property
    def total(self) -> Usage:
        """Of all kinds."""
        kinds = self.usage.values()
        return Usage(sum(one.files for one in kinds), sum(one.bytes for one in kinds))


class Collector:
    """One collection."""

    def __init__(self, database: Database, blobs: BlobStore, settings: Settings) -> None:
        self._database = database
        self._blobs = blobs
        self._settings = settings
        self._undo = timedelta(days=settings.undo_days)

    def run(self, progress: Callable[[Usage], None] = lambda _: None) -> Collected:
        """Collect everything that nothing needs; `progress` is told what is removed so far."""
        collected = Collected()
        self.drop_uploads()
        collected.blocked += self.give_up_deltas()
        for kind, entry in self.unneeded_blocks():
            self._blobs.drop_work(entry.key.partition("/")[0])
            collected.count(kind, entry)
        for found in _batches(self.unneeded_blobs(), REMOVED_AT_ONCE):
            for kind, entry in self.remove(found):
                collected.count(kind, entry)
            progress(collected.total)
        return collected

    def try_run(self) -> Collected:
        """What `run` would remove; changes nothing."""
        collected = Collected()
        free, on_nodes = self._deleted_deltas()
        given_up = {*self._droppable_uploads(), *free}
        collected.blocked += _reasons(on_nodes)
        for kind, entry in (*self.unneeded_blocks(given_up), *self.unneeded_blobs(given_up)):
            collected.count(kind, entry)
        return collected

    def drop_uploads(self) -> None:
        """Give up the uploads that the rules drop."""
        self._one_by_one(self._droppable_uploads(), self._drop_upload)

    def _drop_upload(self, session: Session, upload_id: str) -> None:
        upload = self._droppable(session).lock(upload_id)
        if upload is not None:
            UploadRepository(session, upload.tenant_id).drop(upload)

    def _droppable_uploads(self) -> list[str]:
        with self._database.read_scope() as session:
            return self._droppable(session).find()

    def _droppable(self, session: Session) -> DroppableUploads:
        now, days = database_now(session), self._settings.calibration_days
        limits = DropLimits(
            now=now,
            default=Rule.parse(self._settings.retention),
            texts_before=None if days is None else now - timedelta(days=days),
            undo_from=now - self._undo,
        )
        return DroppableUploads(session, limits)

    def give_up_deltas(self) -> list[str]:
        """Give up the bytes of deltas whose time for undoing is over; returns why some stay."""
        free, on_nodes = self._deleted_deltas()
        self._one_by_one(  # in one order, so that two collections do not wait for each other
            sorted(free),
            lambda session, delta: BlobRepository(session).collect(delta),
            together=True,
        )
        return _reasons(on_nodes)

    def _deleted_deltas(self) -> tuple[list[str], list[DeltaRow]]:
        with self._database.read_scope() as session:
            return BlobRepository(session).deleted_before(database_now(session) - self._undo)

    def unneeded_blocks(self, given_up: Collection[str] = ()) -> Iterator[tuple[str, StoredEntry]]:
        """The saved blocks of jobs that will not continue, were these deltas given up too."""
        for entries in _batches(self._blobs.entries("work")):
            jobs = {entry.key.partition("/")[0] for entry in entries}
            with self._database.read_scope() as session:
                before = database_now(session) - self._undo
                ended = BlobRepository(session).ended_jobs(jobs, before, given_up)
            yield from ((WORK, e) for e in entries if e.key.partition("/")[0] in ended)

    def unneeded_blobs(self, given_up: Collection[str] = ()) -> Iterator[tuple[str, StoredEntry]]:
        """Blobs that no row needs, with what they were for; `remove` checks again.

        Rows of the uploads and deltas `given_up` (ids) need none.
        """
        with self._database.read_scope() as session:
            before = database_now(session) - YOUNG
        old = (entry for entry in self._blobs.entries("blobs") if entry.modified < before)
        for entries in _batches(old):
            digests = [entry.key for entry in entries]
            with self._database.read_scope() as session:
                repository = BlobRepository(session)
                needed = repository.needed(digests)
                freed = repository.only_needed_by(given_up, needed)
                was = {digest: needed.pop(digest) for digest in freed}
                was |= repository.once_needed(set(digests) - needed.keys() - freed)
            for entry in entries:
                if entry.key not in needed:
                    yield was.get(entry.key, BlobKind.UNREFERENCED), entry

    def remove(self, found: Sequence[tuple[str, StoredEntry]]) -> list[tuple[str, StoredEntry]]:
        """Remove those of these blobs that no row needs now; returns them."""
        digests = [entry.key for _, entry in found]
        with self._database.session_scope() as session:
            lock_blobs(session, *digests)
            needed = BlobRepository(session).needed(digests)
            removed = [one for one in found if one[1].key not in needed]
            unneeded = [entry.key for _, entry in removed]
            self._blobs.delete(*unneeded)
            record_each(session, LOCAL_TENANT, AuditAction.BLOB_REMOVE, unneeded)
        self._let_others_write()
        return removed

    def _one_by_one(
        self,
        items: Sequence[Item],
        work: Callable[[Session, Item], object],
        *,
        together: bool = False,
    ) -> None:
        """Do `work` on each of the items, in a transaction of its own.

        On SQLite, and everywhere if no item locks what others need (`together`), a transaction
        takes as many as fit into `HOLD_SECONDS`, since each commit waits for the disk.
        """
        together = together or self._database.is_file
        left = deque(items)
        while left:
            with self._database.session_scope() as session:
                until = time.monotonic() + HOLD_SECONDS
                work(session, left.popleft())
                while left and together and time.monotonic() < until:
                    work(session, left.popleft())
            self._let_others_write()

    def _let_others_write(self) -> None:
        if self._database.is_file:
            time.sleep(PAUSE_SECONDS)


def _reasons(on_nodes: Iterable[DeltaRow]) -> list[str]:
    return [
        f"{delta.name}:{delta.version} ({delta.id}) was deleted, but a node has it in memory; "
        f"unload {delta.artifact_digest} there."
        for delta in on_nodes
    ]


def measure(database: Database, blobs: BlobStore) -> UsageByKind:
    """What is stored, by kind: all files of the store, those of unfinished uploads among them."""
    usage: UsageByKind = {kind: Usage(0, 0) for kind in (*BlobKind, WORK)}
    for area, kind in (("staging", "uploads"), ("parts", "uploads"), ("work", WORK)):
        for entry in blobs.entries(area):  # type: ignore[arg-type]
            usage[kind] = usage[kind].plus(entry.bytes)
    for entries in _batches(blobs.entries("blobs")):
        with database.read_scope() as session:
            kinds = BlobRepository(session).needed([entry.key for entry in entries])
        for entry in entries:
            kind = kinds.get(entry.key, BlobKind.UNREFERENCED)
            usage[kind] = usage[kind].plus(entry.bytes)
    return usage


class StorageMeter:
    """Measures what is stored when asked, at most for a hundredth of the time."""

    def __init__(self, database: Database, blobs: BlobStore) -> None:
        self._database = database
        self._blobs = blobs
        self._lock = threading.Lock()
        self._latest: UsageByKind | None = None
        self._began = 0.0
        self._fresh_until = 0.0
        self._measuring: Future[UsageByKind] | None = None

    def usage(self) -> UsageByKind:
        """What is stored, by kind; a hundred times as old as measuring takes, at most."""
        measured = self._measure()
        return measured if isinstance(measured, dict) else measured.result()

    def usage_within(self, seconds: float) -> UsageByKind | None:
        """As `usage`, or the figures before if measuring takes longer; None: there are none."""
        measured = self._measure()
        left = max(0.0, self._began + seconds - time.monotonic())
        try:
            return measured if isinstance(measured, dict) else measured.result(left)
        except TimeoutError:
            return self._latest

    def _measure(self) -> "UsageByKind | Future[UsageByKind]":
        """The latest figures, or the measurement of newer ones."""
        with self._lock:
            if self._measuring is None:
                if self._latest is not None and time.monotonic() < self._fresh_until:
                    return self._latest
                self._measuring, self._began = Future(), time.monotonic()
                # A daemon: the process may end meanwhile.
                thread = threading.Thread(target=self._run, args=[self._measuring], daemon=True)
                thread.start()
            return self._measuring

    def _run(self, measuring: "Future[UsageByKind]") -> None:
        started = time.monotonic()
        usage: UsageByKind | None = None
        failure: Exception | None = None
        try:
            usage = measure(self._database, self._blobs)
        except Exception as error:
            log.exception("measurement_failed")
            failure = error
        with self._lock:
            ended = time.monotonic()
            self._measuring = None
            self._latest = usage or self._latest
            self._fresh_until = ended + 100 * (ended - started) if usage else ended
        if usage is None:
            measuring.set_exception(failure)
        else:
            measuring.set_result(usage)


def recount(database: Database) -> None:
    """Count anew what counts towards each tenant's quotas."""
    with database.read_scope() as session:
        tenants = TenantRepository(session).ids()
    for tenant_id in tenants:
        with database.session_scope() as session:
            TotalsRepository(session, tenant_id).recount()


class Differences(NamedTuple):
    """Where rows and blobs disagree."""

    missing: list[str]
    """Digests that rows refer to, and the store lacks."""
    unreferenced: list[StoredEntry]
    """Blobs that no row has ever referred to."""


def reconcile(database: Database, blobs: BlobStore) -> Differences:
    """Compare all rows with all blobs; changes nothing."""
    stored = {entry.key: entry for entry in blobs.entries("blobs")}
    missing = missing_blobs(database, blobs, stored)
    unreferenced = []
    for entries in _batches(stored.values()):
        names = [entry.key for entry in entries]
        with database.read_scope() as session:
            repository = BlobRepository(session)
            known = repository.needed(names) | repository.once_needed(names)
        unreferenced += [entry for entry in entries if entry.key not in known]
    return Differences(missing, unreferenced)


def missing_blobs(
    database: Database, blobs: BlobStore, stored: Collection[str] | None = None
) -> list[str]:
    """Digests that rows refer to, and the store lacks; `stored` is a listing of the store."""
    stored = {entry.key for entry in blobs.entries("blobs")} if stored is None else stored
    with database.read_scope() as session:
        absent = [d for d in BlobRepository(session).referenced() if d not in stored]
    # What was stored after the listing is looked up.
    return sorted(digest for digest in absent if not blobs.exists(digest))


def _batches(entries: Iterable[Item], size: int = BATCH) -> Iterator[list[Item]]:
    iterator = iter(entries)
    while batch := list(islice(iterator, size)):
        yield batch
