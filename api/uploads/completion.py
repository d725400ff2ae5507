"""Completes uploads: bytes are imported, hashed and checked in the background before they count.

The upload's row is leased to the process that works on it. A process that dies or stops leaves the
rest to another one: files that are stored by then stay stored.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, Final

import structlog
from starlette.concurrency import run_in_threadpool

from deltadock.api.quotas import within_bytes
from deltadock.api.uploads.ahead import THREADS as HASH_AHEAD_THREADS
from deltadock.api.uploads.ahead import HashAhead, Prefix
from deltadock.api.uploads.assembly import assemble_upload
from deltadock.api.uploads.receive import make_inspector
from deltadock.api.uploads.service import (
    check_arrived,
    check_stored,
    complete_upload,
    drop_parts,
    finish_upload,
    forget_damaged,
    is_all_stored,
    require_upload,
    stored_row,
)
from deltadock.api.uploads.sources import (
    Source,
    SourceFile,
    changed,
    open_source,
    source_files,
)
from deltadock.artifacts.checkpoint import FileEntry, TensorEntry
from deltadock.errors import DamagedBlob, DeltadockError, HashMismatch, NotFound, error_for
from deltadock.fair_threads import FairThreads
from deltadock.settings import Settings
from deltadock.storage.blobs import BlobStore
from deltadock.storage.blobs.parts import part_bytes_for
from deltadock.storage.database import Database
from deltadock.storage.leases import new_owner
from deltadock.storage.repositories import UploadRepository
from deltadock.storage.tables import UploadFileRow, UploadKind, UploadRow, UploadState
from deltadock.storage.tenancy import EVERY_TENANT

WAIT_SECONDS: Final = 5.0
"""A completion that takes longer is answered with 202, and goes on."""
THREADS: Final = 3
"""Uploads at once; each hashes in two threads, one for files and one for tensors."""
IMPORT_THREADS: Final = 3
"""Imports at once: they may wait for their sources for hours."""
TENANT_THREADS: Final = 2
"""Of each kind, for one tenant."""
POLL_SECONDS: Final = 5.0
"""Interval at which a process looks for uploads that another one left."""
REPORT_SECONDS: Final = 1.0
RETRY_SECONDS: Final = 10.0
"""After a store or database that does not answer; twice as long each time that it does not."""
RETRIES: Final = 8
"""In a row, over 40 minutes, until the upload is open again; every one may read all bytes."""

log = structlog.get_logger(__name__)


class _NotOursError(Exception):
    """The upload was aborted, another process has its lease, or this one stops."""


class Completer:
    """This process's background threads; `close` waits for them."""

    def __init__(self, database: Database, blobs: BlobStore, settings: Settings) -> None:
        self._database = database
        self._blobs = blobs
        self._settings = settings
        self._seconds = settings.lease_seconds
        self._owner = new_owner()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._running: dict[str, Future[None]] = {}
        self._threads = FairThreads(THREADS, TENANT_THREADS, "completion")
        self._import_threads = FairThreads(IMPORT_THREADS, TENANT_THREADS, "import")
        hashers = THREADS + IMPORT_THREADS + HASH_AHEAD_THREADS
        self._hashers = ThreadPoolExecutor(hashers, "hashing")
        self.ahead = HashAhead(self._hashers)
        self._poller = threading.Thread(target=self._poll, name="completer", daemon=True)

    def start(self) -> None:
        """Look for completing uploads that no process works on, now and then."""
        self._poller.start()

    def close(self) -> None:
        """Stop; what is unfinished is left to other processes, or to the next start."""
        self._stopping.set()
        if self._poller.is_alive():
            self._poller.join()
        self._threads.shutdown()
        self._import_threads.shutdown()
        self.ahead.close()
        self._hashers.shutdown()

    async def complete(self, tenant_id: str, upload_id: str) -> UploadRow:
        """The upload, complete unless that takes long.

        Raises:
            DeltadockError: why its files are not accepted.
        """
        upload = await run_in_threadpool(self._begin, tenant_id, upload_id)
        if upload.state is UploadState.COMPLETING:
            work = asyncio.wrap_future(self.submit(upload_id, tenant_id, upload.source))
            await asyncio.wait([work], timeout=WAIT_SECONDS)
            upload = await run_in_threadpool(self._find, tenant_id, upload_id)
            if upload.state is UploadState.OPEN and (reason := upload.error):
                raise error_for(reason["code"], reason["message"], file=reason["file"])
        return upload

    def _begin(self, tenant_id: str, upload_id: str) -> UploadRow:
        """The upload, complete if all its files are stored, else completing."""
        assembled = None
        upload = self._find(tenant_id, upload_id)
        if upload.state is UploadState.OPEN and upload.source is None:
            check_arrived(self._blobs, upload)
        try:
            if upload.state is UploadState.OPEN and is_all_stored(upload):
                with self._database.read_scope() as session:
                    assembled = assemble_upload(session, self._blobs, upload)
            with self._database.session_scope() as session:
                return complete_upload(session, self._blobs, tenant_id, upload_id, assembled)
        except DamagedBlob as error:
            with self._database.session_scope() as session:
                forget_damaged(session, tenant_id, upload_id, error)
            raise

    def _find(self, tenant_id: str, upload_id: str) -> UploadRow:
        with self._database.read_scope() as session:
            return require_upload(session, tenant_id, upload_id)

    def submit(self, upload_id: str, tenant_id: str, source: str | None) -> Future[None]:
        """Work on a completing upload, whose row is committed, unless another process does.

        Tenants take turns, and imports have threads of their own.
        """
        threads = self._threads if source is None else self._import_threads
        with self._lock:
            if upload_id not in self._running:
                work = partial(copy_context().run, self.run, upload_id)
                future = threads.submit(tenant_id, work)
                self._running[upload_id] = future
                future.add_done_callback(lambda _: self._running.pop(upload_id, None))
                return future
            return self._running[upload_id]

    def _poll(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._database.read_scope() as session:
                    waiting = UploadRepository(session, EVERY_TENANT).unleased()
                for upload in waiting:
                    self.submit(*upload)
            except DeltadockError as error:  # such as a database that is temporarily down
                log.warning("completer_failed", error=error.message)
            except Exception:
                log.exception("completer_failed")
            self._stopping.wait(POLL_SECONDS)

    def run(self, upload_id: str) -> None:
        """Complete the upload, or record why it is not accepted."""
        with structlog.contextvars.bound_contextvars(upload=upload_id):
            with self._database.session_scope() as session:
                uploads = UploadRepository(session, EVERY_TENANT)
                upload = uploads.acquire(upload_id, self._owner, self._seconds)
            if upload is None:
                return
            log.info("completion_started")
            try:
                error = self._complete(upload)
                log.info("completion_ended", error=error and error.code)
            except _NotOursError:
                log.info("completion_left")
                self._release(upload_id, 0.0, upload.error)
            except DeltadockError as error:  # the store or the database
                self._retry(upload, error)
            except Exception:
                log.exception("completion_failed")
                hidden = DeltadockError("Completing the upload failed; see the api's log.")
                self._reopen(upload_id, hidden, None)

    def _retry(self, upload: UploadRow, error: DeltadockError) -> None:
        """Leave the upload for a while, with the error; after too many retries it is open again."""
        retries = (upload.error or {"retries": 0})["retries"]
        if retries == RETRIES:
            log.warning("completion_given_up", code=error.code, error=error.message)
            self._reopen(upload.id, error, None)
            return
        log.warning("completion_retries", code=error.code, error=error.message)
        reason = _reason(error, None) | {"retries": retries + 1}
        self._release(upload.id, RETRY_SECONDS * 2**retries, reason)

    def _release(self, upload_id: str, retry_seconds: float, reason: dict[str, Any] | None) -> None:
        try:
            with self._database.session_scope() as session:
                UploadRepository(session, EVERY_TENANT).release(
                    upload_id, self._owner, retry_seconds, reason
                )
        except DeltadockError as error:  # the lease expires
            log.warning("lease_not_released", error=error.message)

    def _complete(self, upload: UploadRow) -> DeltadockError | None:
        """Store every file and finish; returns the error that opened the upload again."""
        progress = _Progress(self, upload.id)
        try:
            steps = dict(self._steps(upload, progress))
        except DeltadockError as error:  # the source is gone, or no longer allowed
            if _may_pass(error):
                raise
            self._reopen(upload.id, error, None)
            return error
        first: tuple[DeltadockError, str | None] | None = None
        for path, store in steps.items():
            try:
                store()
            except DeltadockError as error:
                if _may_pass(error):
                    raise
                first = first or (error, path)  # the others may be good
        if first is not None:
            self._reopen(upload.id, *first)
            return first[0]
        progress.report()
        try:
            with self._database.read_scope() as session:
                stored = UploadRepository(session, EVERY_TENANT).find(upload.id)
                if stored is None:
                    raise _NotOursError
                assembled = assemble_upload(session, self._blobs, stored)
            with self._database.session_scope() as session:
                held = UploadRepository(session, EVERY_TENANT).find_held(upload.id, self._owner)
                if held is None:
                    raise _NotOursError
                finish_upload(session, self._blobs, held, assembled)
        except DeltadockError as error:
            if _may_pass(error):
                raise
            self._reopen(upload.id, error, None)
            return error
        drop_parts(self._blobs, upload.id)
        return None

    def _reopen(self, upload_id: str, error: DeltadockError, path: str | None) -> None:
        with self._database.session_scope() as session:
            uploads = UploadRepository(session, EVERY_TENANT)
            if held := uploads.find_held(upload_id, self._owner):
                if isinstance(error, DamagedBlob):
                    path = uploads.forget_damaged(held, error.digest)
                uploads.reopen(held, _reason(error, path))

    def _steps(
        self, upload: UploadRow, progress: "_Progress"
    ) -> Iterator[tuple[str | None, Callable[[], None]]]:
        """What stores each file that is not stored yet, by its path.

        An import ends with a look at the whole source.
        """
        if upload.source is None:
            for file in upload.files:
                if file.stored:
                    progress.advance(file.size)
                else:
                    yield file.path, partial(self._store, upload, file, progress)
            return
        source = open_source(upload.source, self._settings)
        files = source_files(source, upload.kind)
        kept = self._keep_imported(upload, files)
        for path, entry in files.items():
            if path in kept:
                progress.advance(entry.size)
            else:
                yield path, partial(self._import, upload, source, path, entry, progress)
        yield None, partial(self._check_unchanged, source, upload.kind, files)

    def _keep_imported(self, upload: UploadRow, files: Mapping[str, SourceFile]) -> set[str]:
        """Forget what the source has no longer, or otherwise; returns the paths that are stored.

        Raises:
            QuotaExceeded: it has more by now than the tenant may store.
        """
        with self._database.session_scope() as session:
            uploads = UploadRepository(session, EVERY_TENANT)
            held = uploads.find_held(upload.id, self._owner)
            if held is None:
                raise _NotOursError
            with within_bytes(session, held.tenant_id):
                held.source_bytes = sum(file.size for file in files.values())
                versions = {path: file.version for path, file in files.items()}
                return uploads.keep_imported(held, versions)

    def _import(
        self,
        upload: UploadRow,
        source: Source,
        path: str,
        file: SourceFile,
        progress: "_Progress",
    ) -> None:
        """Read a file from the upload's source, check it and store it.

        Raises:
            InvalidCheckpoint, InvalidCalibration: it is no valid file.
            InvalidInput: it changed meanwhile.
            NotFound: it is gone.
        """
        inspector = make_inspector(upload.kind, path, self._hashers)
        with self._blobs.writer() as writer:
            for chunk in source.read(path, file):
                inspector.update(chunk)
                writer.write(chunk)
                progress.advance(len(chunk))
            checked = inspector.finish()
            if checked[0].size != file.size:
                raise changed(path)
            writer.commit(checked[0].sha256, progress.report_soon)
        self._record(upload, *checked, file.version)

    def _check_unchanged(
        self, source: Source, kind: UploadKind, files: Mapping[str, SourceFile]
    ) -> None:
        """Check that the imported files were all in the source at one time.

        Raises:
            InvalidInput: one of them, which may have been imported already, is another one now.
            NotFound, InvalidCheckpoint: as `source_files`.
        """
        now = source_files(source, kind)
        for path in sorted(files.keys() | now.keys()):
            if files.get(path) != now.get(path):
                raise changed(path)

    def _record(
        self,
        upload: UploadRow,
        file: FileEntry,
        tensors: list[TensorEntry],
        source_version: str | None = None,
    ) -> None:
        row = stored_row(upload.id, file, tensors, source_version)
        with self._database.session_scope() as session:
            uploads = UploadRepository(session, EVERY_TENANT)
            held = uploads.find_held(upload.id, self._owner)
            if held is None:
                raise _NotOursError
            uploads.put_file(held, row)
            check_stored(self._blobs, file.sha256)
            held.error = None  # of an earlier attempt: this one gets on

    def _store(self, upload: UploadRow, file: UploadFileRow, progress: "_Progress") -> None:
        """Hash and check a file's stored parts, from the first that is not known, and make them a
        blob.

        Raises:
            HashMismatch, InvalidCheckpoint, InvalidCalibration: the bytes are not what they should
                be; all parts are dropped, to be sent again.
            NotFound: the parts are gone.
            Conflict: parts are missing.
        """
        if file.parts_token is None:
            raise NotFound(f"{file.path!r} has not arrived; send it.")
        parts = self._blobs.parted(
            upload.id, file.parts_token, file.size, part_bytes_for(file.size)
        )
        checked: tuple[FileEntry, list[TensorEntry]] | None = None

        def verify() -> None:
            nonlocal checked
            known = self.ahead.take(parts) or Prefix(
                make_inspector(upload.kind, file.path, self._hashers)
            )
            inspector, start = known.inspector, len(known.stamps) * parts.part_bytes
            progress.advance(min(start, file.size))
            for chunk in parts.read(start, file.size):
                inspector.update(chunk)
                progress.advance(len(chunk))
            checked = inspector.finish()
            if checked[0].sha256 != file.sha256:
                raise HashMismatch(
                    f"{file.path!r} arrived with SHA-256 {checked[0].sha256}, but {file.sha256} "
                    "was announced. Send this file again; the others are kept."
                )

        try:
            parts.seal()
            parts.publish(file.sha256, verify, progress.report_soon)
        except DeltadockError as error:
            if error.status < 500 and error.code != "conflict":
                self._forget_parts(upload.id, file.path)
                parts.drop()
            raise
        assert checked is not None
        self._record(upload, *checked)
        parts.drop()

    def _forget_parts(self, upload_id: str, path: str) -> None:
        with self._database.session_scope() as session:
            UploadRepository(session, EVERY_TENANT).set_parts_token(upload_id, path, None)

    def renew(self, upload_id: str, done_bytes: int) -> None:
        """Renew the lease and record progress.

        Raises:
            _NotOursError: this process must not go on.
        """
        with self._database.session_scope() as session:
            held = UploadRepository(session, EVERY_TENANT).renew(
                upload_id, self._owner, self._seconds, done_bytes
            )
        if not held or self._stopping.is_set():
            raise _NotOursError


def _may_pass(error: DeltadockError) -> bool:
    """Whether another attempt may succeed without a change of the upload."""
    return error.status >= 500 and not isinstance(error, DamagedBlob)


def _reason(error: DeltadockError, path: str | None) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "file": path}


class _Progress:
    """Counts the bytes of an upload that are checked, and reports them at an interval."""

    def __init__(self, completer: Completer, upload_id: str) -> None:
        self._completer = completer
        self._upload_id = upload_id
        self._done = 0
        self._reported = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        self.report_soon()

    def report_soon(self) -> None:
        """Report if the last time is a while ago, which renews the lease."""
        if time.monotonic() - self._reported > REPORT_SECONDS:
            self.report()

    def report(self) -> None:
        self._completer.renew(self._upload_id, self._done)
        self._reported = time.monotonic()
