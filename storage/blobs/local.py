"""Blobs in a local folder."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from deltadock.errors import NotFound, Unavailable
from deltadock.storage.blobs.port import CHUNK_BYTES, BlobStore, BlobWriter, blob_key, work_key


class LocalBlobStore(BlobStore):
    """A folder; files are staged and renamed, so every change is atomic."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        try:
            for name in ("blobs", "staging", "work"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(f"The blob folder {self.root} cannot be used.") from error

    def writer(self) -> BlobWriter:
        self.prepare()
        return _LocalWriter(self)

    def open(self, digest: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        path = self.path(digest)
        left = self.size(digest) - start if end is None else end - start

        def chunks() -> Iterator[bytes]:
            nonlocal left
            with path.open("rb") as stream:
                stream.seek(start)
                while left > 0 and (chunk := stream.read(min(left, CHUNK_BYTES))):
                    left -= len(chunk)
                    yield chunk

        return chunks()

    def size(self, digest: str) -> int:
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError as error:
            raise NotFound(f"The store holds no file {digest}.") from error

    def delete(self, digest: str) -> None:
        self.path(digest).unlink(missing_ok=True)

    def get_work(self, key: str) -> bytes | None:
        try:
            return (self.root / work_key(key)).read_bytes()
        except FileNotFoundError:
            return None

    def put_work(self, key: str, data: bytes) -> None:
        self.prepare()
        target = self.root / work_key(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = self.root / "staging" / uuid.uuid4().hex
        try:
            with staged.open("xb") as stream:
                stream.write(data)
                _sync(stream.fileno())
            staged.replace(target)
        finally:
            staged.unlink(missing_ok=True)

    def drop_work(self, prefix: str) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(self.root / work_key(prefix))

    def drop_staging(self, before: datetime) -> int:
        dropped = 0
        for path in (self.root / "staging").glob("*"):
            with suppress(FileNotFoundError):  # committed meanwhile by a slow writer
                if path.stat().st_mtime < before.timestamp():
                    path.unlink()
                    dropped += 1
        return dropped

    def path(self, digest: str) -> Path:
        """The blob's path; NotFound if `digest` is not a SHA-256."""
        return self.root / blob_key(digest)

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
    """A file in staging/, renamed into place."""

    def __init__(self, store: LocalBlobStore) -> None:
        self._store = store
        self._path = store.root / "staging" / uuid.uuid4().hex
        self._file = self._path.open("xb")

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        self._file.write(chunk)

    def commit(self, digest: str) -> None:
        target = self._store.path(digest)
        self._file.flush()
        _sync(self._file.fileno())
        self._file.close()
        self._path.chmod(0o444)  # fetched files may be hard links to this one
        if not target.exists():
            self._path.replace(target)
            _sync_folder(target.parent)

    def discard(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)
