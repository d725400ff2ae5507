"""What a blob store does.

blobs/<sha256>                 immutable, named by content
staging/...                    bytes still arriving, dropped if they never do
work/<fingerprint>/<block>     small results of a running job, replaceable and deletable
"""

import hashlib
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from deltadock.errors import HashMismatch, InvalidInput, NotFound

CHUNK_BYTES: Final = 1 << 20

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_WORK_KEY: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


class BlobWriter(ABC):
    """Bytes on their way into the store; leaving the `with` block without `commit` drops them."""

    @abstractmethod
    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Append `chunk`; blocks while the store is slower than the sender."""

    @abstractmethod
    def commit(self, digest: str) -> None:
        """Make the bytes the blob `digest`, their SHA-256 (hex) as the caller computed it.

        Once this returns the blob is durable. A blob that exists already stays as it is.
        """

    @abstractmethod
    def discard(self) -> None:
        """Drop what was not committed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.discard()


class BlobStore(ABC):
    """The port. Digests are lower-case hex; anything else names no blob."""

    @abstractmethod
    def prepare(self) -> None:
        """Create the folder or bucket if it is not there.

        Raises:
            Unavailable: the store does not answer.
        """

    @abstractmethod
    def writer(self) -> BlobWriter:
        """A writer for a blob whose digest will be known when its last byte has passed."""

    @abstractmethod
    def open(self, digest: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes `[start, end)` in chunks; by default all of them.

        Raises:
            NotFound: before the first chunk, if there is no such blob.
        """

    @abstractmethod
    def size(self, digest: str) -> int:
        """Size in bytes.

        Raises:
            NotFound: there is no such blob.
        """

    @abstractmethod
    def delete(self, digest: str) -> None:
        """Remove a blob, if it is there."""

    @abstractmethod
    def get_work(self, key: str) -> bytes | None:
        """The value under `key` (`<fingerprint>/<block>`), or None."""

    @abstractmethod
    def put_work(self, key: str, data: bytes) -> None:
        """Set the value under `key`; readers see the old or the new one, never a part."""

    @abstractmethod
    def drop_work(self, prefix: str) -> None:
        """Remove every value under `<prefix>/`."""

    @abstractmethod
    def drop_staging(self, before: datetime) -> int:
        """Remove bytes whose writer last wrote before `before` and must have died; how many."""

    @abstractmethod
    def _place(self, digest: str, target: Path) -> None:
        """Put the blob's bytes at the new path `target`."""

    def exists(self, digest: str) -> bool:
        """Whether there is such a blob."""
        try:
            self.size(digest)
        except NotFound:
            return False
        return True

    def read(self, digest: str, limit: int) -> bytes:
        """A small blob whole.

        Raises:
            NotFound: there is no such blob.
            InvalidInput: it is larger than `limit` bytes.
        """
        if self.size(digest) > limit:
            raise InvalidInput(f"The file {digest} is larger than {limit} bytes.")
        return b"".join(self.open(digest))

    def fetch(self, digest: str, path: Path) -> None:
        """Bring a blob to `path`, which appears only once its bytes are verified.

        The file is read-only and may share its bytes with the store: never write to it.

        Raises:
            NotFound: there is no such blob.
            HashMismatch: the store's bytes are not those the digest names.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        arriving = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            self._place(digest, arriving)
            actual = sha256_of(arriving)
            if actual != digest:
                raise HashMismatch(
                    f"Blob {digest} is damaged in the store: its bytes hash to {actual}. "
                    "Restore it from a backup or upload it again."
                )
            arriving.replace(path)
        finally:
            arriving.unlink(missing_ok=True)

    def put_file(self, path: Path) -> str:
        """Store a file; its digest."""
        digest = hashlib.sha256()
        with self.writer() as writer, path.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                writer.write(chunk)
            writer.commit(digest.hexdigest())
        return digest.hexdigest()

    def put_bytes(self, data: bytes) -> str:
        """Store a few bytes; their digest."""
        digest = hashlib.sha256(data).hexdigest()
        with self.writer() as writer:
            writer.write(data)
            writer.commit(digest)
        return digest


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def blob_key(digest: str) -> str:
    """The key of a blob.

    Raises:
        NotFound: `digest` is not 64 lower-case hex digits, so nothing can have it.
    """
    if not _DIGEST.fullmatch(digest):
        raise NotFound(f"{digest!r} is not a SHA-256 digest, so no file has it.")
    return f"blobs/{digest}"


def work_key(key: str) -> str:
    """The key of a job's intermediate result.

    Raises:
        ValueError: `key` is not made of plain names between slashes.
    """
    if not _WORK_KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not a plain work key.")
    return f"work/{key}"
