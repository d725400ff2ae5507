"""Blobs in a local folder."""

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from deltadock.errors import DamagedBlob, NotFound
from deltadock.storage.blobs.local_parts import LocalPartedFile, store_errors, write_at
from deltadock.storage.blobs.parts import PartedFile
from deltadock.storage.blobs.port import (
    CHUNK_BYTES,
    Area,
    BlobStore,
    BlobWriter,
    StoredEntry,
    blob_key,
    nobody_waits,
    parts_key,
    work_key,
)
from deltadock.storage.blobs.writer import Chunk

NO_HARD_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})

log = structlog.get_logger(__name__)


class LocalBlobStore(BlobStore):
    """A folder; files are staged and renamed, so every change is atomic."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        with store_errors():
            for name in ("blobs", "staging", "work"):
                (self.root / name).mkdir(parents=True, exist_ok=True)

    def writer(self) -> BlobWriter:
        self.prepare()
        with store_errors():
            return _LocalWriter(self)

    def open(self, digest: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        path = self.path(digest)
        size = self.size(digest)
        left = (size if end is None else min(end, size)) - start

        def chunks() -> Iterator[bytes]:
            nonlocal left
            with store_errors():
                try:
                    stream = path.open("rb")
                except FileNotFoundError as error:
                    raise NotFound(f"The store no longer holds {digest}.") from error
                with stream:
                    stream.seek(start)
                    while left > 0 and (chunk := stream.read(min(left, CHUNK_BYTES))):
                        left -= len(chunk)
                        yield chunk
            if left > 0:
                raise DamagedBlob(
                    f"The store's file {digest} ends early; restore it, or upload it again.",
                    digest=digest,
                )

        return chunks()

    def size(self, digest: str) -> int:
        with store_errors():
            try:
                return self.path(digest).stat().st_size
            except FileNotFoundError as error:
                raise NotFound(f"The store holds no file {digest}.") from error

    def delete(self, *digests: str) -> None:
        with store_errors():
            for digest in digests:
                self.path(digest).unlink(missing_ok=True)

    def get_work(self, key: str) -> bytes | None:
        with store_errors(), suppress(FileNotFoundError):
            return (self.root / work_key(key)).read_bytes()
        return None

    def put_work(self, key: str, data: bytes) -> None:
        self.prepare()
        target = self.root / work_key(key)
        staged = self.root / "staging" / uuid.uuid4().hex
        with store_errors():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with staged.open("xb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                staged.replace(target)
            finally:
                staged.unlink(missing_ok=True)

    def drop_work(self, prefix: str) -> None:
        with store_errors(), suppress(FileNotFoundError):
            shutil.rmtree(self.root / work_key(prefix))

    def entries(self, area: Area) -> Iterator[StoredEntry]:
        folders = [""]
        with store_errors():
            while folders:
                inside = folders.pop()
                with suppress(FileNotFoundError), os.scandir(self.root / area / inside) as found:
                    for entry in found:
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(f"{inside}{entry.name}/")
                            continue
                        with suppress(FileNotFoundError):  # removed or renamed meanwhile
                            status = entry.stat()
                            modified = datetime.fromtimestamp(status.st_mtime, UTC)
                            yield StoredEntry(inside + entry.name, status.st_size, modified)

    def drop_staging(self, before: datetime) -> int:
        dropped = 0
        for path in (self.root / "staging").glob("*"):
            # Absent if a slow writer has committed it meanwhile.
            with store_errors(), suppress(FileNotFoundError):
                if path.stat().st_mtime < before.timestamp():
                    path.unlink()
                    dropped += 1
        return dropped

    def begin_parts(self, upload: str, size: int, part_bytes: int) -> PartedFile:
        return LocalPartedFile.create(self.root / parts_key(upload), size, part_bytes, self.link)

    def parted(self, upload: str, token: str, size: int, part_bytes: int) -> PartedFile:
        folder = self.root / parts_key(upload)
        return LocalPartedFile(folder, token, size, part_bytes, self.link)

    def parted_uploads(self) -> frozenset[str]:
        with store_errors(), suppress(FileNotFoundError):
            return frozenset(path.name for path in (self.root / parts_key("")).iterdir())
        return frozenset()

    def drop_parts(self, upload: str) -> None:
        with store_errors(), suppress(FileNotFoundError):
            shutil.rmtree(self.root / parts_key(upload))

    def path(self, digest: str) -> Path:
        """The blob's path; NotFound if `digest` is not a SHA-256."""
        return self.root / blob_key(digest)

    def link(self, staged: Path, digest: str, alive: Callable[[], None]) -> None:
        """Give `staged` the name of the blob `digest`, durably, unless that exists undamaged.

        It loses its old name where it replaces a damaged blob, and on a file system without hard
        links.
        """
        target = self.path(digest)
        try:
            os.link(staged, target)  # fails if it exists, unlike a rename
        except OSError as error:
            if not isinstance(error, FileExistsError) and error.errno not in NO_HARD_LINKS:
                raise
            # A rename, since nodes and workers may have hard links to the damaged bytes.
            if not self.is_intact(digest, alive):
                staged.replace(target)
        sync_folder(target.parent)

    def _place(self, digest: str, target: Path) -> None:
        source = self.path(digest)
        try:
            try:
                os.link(source, target)
            except FileNotFoundError:
                raise
            except OSError:  # a different file system, or one without hard links
                shutil.copyfile(source, target)
        except FileNotFoundError as error:
            raise NotFound(f"The store holds no file {digest}.") from error


class _LocalWriter(BlobWriter):
    """A file in staging/, linked to its final name."""

    def __init__(self, store: LocalBlobStore) -> None:
        self._store = store
        self._path = store.root / "staging" / uuid.uuid4().hex
        # Unbuffered: a full disk is reported by the write that meets it, and never again by close.
        self._file = self._path.open("xb", buffering=0)
        self._size = 0

    def write(self, *chunks: Chunk) -> None:
        with store_errors():
            self._size += write_at(self._file.fileno(), chunks, self._size)

    def commit(self, digest: str, alive: Callable[[], None] = nobody_waits) -> None:
        with store_errors():
            os.fsync(self._file.fileno())
            self._file.close()
            self._path.chmod(0o444)  # fetched files may be hard links to this one
            self._store.link(self._path, digest, alive)

    def discard(self) -> None:
        try:
            self._file.close()
            self._path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("staged_file_not_dropped", file=self._path.name, error=str(error))


def sync_folder(folder: Path) -> None:
    """Make a new name in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
