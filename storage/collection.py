"""Collection of bytes that nothing needs any more.

It goes in four steps: the rules drop fine-tunes and texts; deltas that were deleted some
days ago are given up; then the saved blocks of ended jobs and the blobs that no row needs are
removed. Every step is in transactions of its own and safe beside pushes of the same bytes (see
`BlobRepository`), so that several processes may collect at once.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, TypeVar

from sqlalchemy.orm import Session

from deltadock.settings import Settings
from deltadock.storage.blobs import BlobStore, StoredEntry
from deltadock.storage.database import Database, database_now
from deltadock.storage.repositories.audit import record_each
from deltadock.storage.repositories.blobs import BlobKind, BlobRepository, batches, lock_blobs
from deltadock.storage.repositories.retention import DropLimits, DroppableUploads, Rule
from deltadock.storage.repositories.uploads import UploadRepository
from deltadock.storage.tables import AuditAction, DeltaRow
from deltadock.storage.tenancy import LOCAL_TENANT
from deltadock.storage.usage import WORK, Usage, UsageByKind

YOUNG: Final = timedelta(hours=1)
"""Blobs younger than this are left alone: their rows may be yet to come."""
REMOVED_AT_ONCE: Final = 200
"""Blobs, in one transaction: each is locked, and on SQLite no other writes meanwhile."""
DROPPED_AT_ONCE: Final = 50
"""Uploads, in one transaction on SQLite, where a commit waits for the disk."""
HOLD_SECONDS: Final = 0.1
"""How long a transaction of many changes may keep others waiting."""
PAUSE_SECONDS: Final = 0.1
"""Who waits for SQLite's lock looks for it at least so often."""

Item = TypeVar("Item")


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
        for found in batches(self.unneeded_blobs(), REMOVED_AT_ONCE):
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
        # Elsewhere one by one: each locks what others of its tenant wait for.
        at_once = DROPPED_AT_ONCE if self._database.is_file else 1
        for upload_ids in batches(sorted(self._droppable_uploads()), at_once):
            with self._database.session_scope() as session:
                for upload in self._droppable(session).lock(upload_ids):
                    UploadRepository(session, upload.tenant_id).drop(upload)
            self._let_others_write()

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
        )
        return _reasons(on_nodes)

    def _deleted_deltas(self) -> tuple[list[str], list[DeltaRow]]:
        with self._database.read_scope() as session:
            return BlobRepository(session).deleted_before(database_now(session) - self._undo)

    def unneeded_blocks(self, given_up: Collection[str] = ()) -> Iterator[tuple[str, StoredEntry]]:
        """The saved blocks of jobs that will not continue, were these deltas given up too."""
        for entries in batches(self._blobs.entries("work")):
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
        for entries in batches(old):
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
        """Remove those of these blobs that no row needs now; returns them.

        If that ends half-way, what is gone is recorded first: no later collection finds it.
        """
        digests = [entry.key for _, entry in found]
        failure: BaseException | None = None
        with self._database.session_scope() as session:
            lock_blobs(session, *digests)
            needed = BlobRepository(session).needed(digests)
            removed = [one for one in found if one[1].key not in needed]
            unneeded = [entry.key for _, entry in removed]
            try:
                self._blobs.delete(*unneeded)
            except BaseException as error:  # noqa: BLE001  # raised below; an interrupt, too
                failure = error
                unneeded = [digest for digest in unneeded if not self._blobs.exists(digest)]
            record_each(session, LOCAL_TENANT, AuditAction.BLOB_REMOVE, unneeded)
        if failure is not None:
            raise failure
        self._let_others_write()
        return removed

    def _one_by_one(self, items: Sequence[Item], work: Callable[[Session, Item], object]) -> None:
        """Do `work`, which locks nothing that others need, on each of the items.

        A transaction takes as many as fit into `HOLD_SECONDS`, since each commit waits for the
        disk.
        """
        left = deque(items)
        while left:
            with self._database.session_scope() as session:
                until = time.monotonic() + HOLD_SECONDS
                work(session, left.popleft())
                while left and time.monotonic() < until:
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
