"""The blob store's interface. Its key space:

blobs/<sha256>                 immutable, content-addressed
staging/...                    blobs that are being written, dropped when abandoned
parts/<upload>/...             files of an upload that arrive in parts
work/<job>/<block>             saved blocks of a running job, replaceable and deletable
"""

import errno
import hashlib
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Final, Literal, NamedTuple

from deltadock.errors import DamagedBlob, InvalidInput, NotFound, StorageFull, Unavailable
from deltadock.names import DIGEST
from deltadock.storage.blobs.parts import PartedFile
from deltadock.storage.blobs.writer import Chunk, Writer

CHUNK_BYTES: Final = 1 << 20

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
READ_ONLY: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})

_DIGEST: Final = re.compile(DIGEST)
_WORK_KEY: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


Area = Literal["blobs", "staging", "parts", "work"]


class StoredEntry(NamedTuple):
    """One stored file: its key within the area (of a blob, its digest), size and last change."""

    key: str
    bytes: int
    modified: datetime


def nobody_waits() -> None:
    """The default of `alive`: nobody waits."""


class BlobWriter(Writer):
    """Streams one blob into the store.

    A store that fails raises Unavailable or StorageFull, as all of its methods do.
    """

    @abstractmethod
    def write(self, *chunks: Chunk) -> None:
        """Append the chunks; blocks until the store has accepted them."""

    @abstractmethod
    def commit(self, digest: str, alive: Callable[[], None] = nobody_waits) -> None:
        """Store the written bytes as the blob `digest`, their SHA-256 (hex) by the caller.

        The blob is durable once this returns. An existing blob is read: it is left unchanged, so
        that of two writers the first to commit wins, unless it is damaged; then it is replaced.

        Args:
            digest: of the bytes.
            alive: called now and then while an existing blob is read; what it raises is raised.
        """


class BlobStore(ABC):
    """Content-addressed immutable blobs. Digests are lower-case hex; others raise NotFound.

    Every method retries what may succeed a moment later, with exponential back-off. Then it raises
    Unavailable (the store does not answer, is read-only or refuses the credentials) or StorageFull,
    and leaves nothing half-made.
    """

    buffer_bytes = 0
    """What a writer holds in memory at most, until it sends that."""

    @abstractmethod
    def prepare(self) -> None:
        """Create the folder or bucket if it does not exist, and find out what it can do."""

    @abstractmethod
    def writer(self) -> BlobWriter:
        """A writer for a blob whose digest is known only at the end."""

    @abstractmethod
    def open(self, digest: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes `[start, end)` in chunks; by default all of them.

        Raises:
            NotFound: there is no such blob; raised before the first chunk.
            DamagedBlob: the stored blob ends early; raised in place of the missing bytes.
        """

    @abstractmethod
    def size(self, digest: str) -> int:
        """Size in bytes.

        Raises:
            NotFound: there is no such blob.
        """

    @abstractmethod
    def delete(self, *digests: str) -> None:
        """Remove those of these blobs that exist."""

    @abstractmethod
    def get_work(self, key: str) -> bytes | None:
        """The value under `key` (`<job>/<block>`), or None."""

    @abstractmethod
    def put_work(self, key: str, data: bytes) -> None:
        """Set the value under `key` atomically."""

    @abstractmethod
    def drop_work(self, prefix: str) -> None:
        """Remove every value under `<prefix>/`."""

    @abstractmethod
    def begin_parts(self, upload: str, size: int, part_bytes: int) -> PartedFile:
        """A new file of `upload` that arrives in parts."""

    @abstractmethod
    def parted(self, upload: str, token: str, size: int, part_bytes: int) -> PartedFile:
        """The file that `begin_parts` returned with this token."""

    @abstractmethod
    def parted_uploads(self) -> frozenset[str]:
        """The uploads of which parts are stored."""

    @abstractmethod
    def drop_parts(self, upload: str) -> None:
        """Remove every part of an upload."""

    @abstractmethod
    def entries(self, area: Area) -> Iterator[StoredEntry]:
        """Everything that is stored in an area, in no order; what is written meanwhile may lack."""

    @abstractmethod
    def drop_staging(self, before: datetime) -> int:
        """Remove staged blobs not written to since `before`; returns how many."""

    @abstractmethod
    def _place(self, digest: str, target: Path) -> None:
        """Write or link the blob to the new path `target`."""

    def presigned_url(self, digest: str, *, disposition: str, media_type: str) -> str | None:
        """A short-lived URL from which clients can GET the blob.

        Args:
            digest: of an existing blob.
            disposition: the answer's Content-Disposition.
            media_type: the answer's Content-Type.

        Returns:
            None if clients cannot reach the store: serve `open` instead.
        """
        return None

    def exists(self, digest: str) -> bool:
        """Whether the blob exists."""
        try:
            self.size(digest)
        except NotFound:
            return False
        return True

    def is_intact(self, digest: str, alive: Callable[[], None] = nobody_waits) -> bool:
        """Whether the blob exists and its bytes match the digest; reads all of them.

        `alive` is called after each chunk; what it raises is raised.
        """
        actual = hashlib.sha256()
        try:
            for chunk in self.open(digest):
                actual.update(chunk)
                alive()
        except (NotFound, DamagedBlob):
            return False
        return actual.hexdigest() == digest

    def read(self, digest: str, limit: int) -> bytes:
        """Read a small blob into memory.

        Raises:
            NotFound: there is no such blob.
            InvalidInput: it is larger than `limit` bytes.
            DamagedBlob: the stored bytes do not match the digest.
        """
        if self.size(digest) > limit:
            raise InvalidInput(f"The file {digest} is larger than {limit} bytes.")
        content = b"".join(self.open(digest))
        _check(digest, hashlib.sha256(content).hexdigest())
        return content

    def fetch(self, digest: str, path: Path) -> None:
        """Fetch a blob to `path`, which appears only after its SHA-256 has been verified.

        The file is read-only and may be a hard link into the store: never write to it.

        Raises:
            NotFound: there is no such blob.
            DamagedBlob: the stored bytes do not match the digest.
        """
        arriving = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        with disk_errors(CACHE):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._place(digest, arriving)
                _check(digest, sha256_of(arriving))
                arriving.replace(path)
            finally:
                arriving.unlink(missing_ok=True)

    def put_file(self, path: Path) -> str:
        """Store a file; returns its digest."""
        digest = hashlib.sha256()
        with self.writer() as writer, path.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                writer.write(chunk)
            writer.commit(digest.hexdigest())
        return digest.hexdigest()

    def put_bytes(self, data: bytes) -> str:
        """Store bytes held in memory; returns their digest."""
        digest = hashlib.sha256(data).hexdigest()
        with self.writer() as writer:
            writer.write(data)
            writer.commit(digest)
        return digest


CACHE: Final = "The cache's folder"
"""Begins the messages of `disk_errors` about it."""


@contextmanager
def disk_errors(place: str) -> Iterator[None]:
    """Translate the errors of a local disk.

    Args:
        place: begins the message, such as "The blob store's folder".

    Raises:
        StorageFull: no space is left, or a quota or the maximum size of a file is reached.
        Unavailable: the disk is read-only or fails.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageFull(
                f"{place} is full. Free space on its disk or raise its quota, then try again."
            ) from error
        if error.errno in READ_ONLY:
            raise Unavailable(
                f"{place} cannot be written: it is read-only, or belongs to another user. Check "
                "its mount and its permissions, then try again."
            ) from error
        raise Unavailable(f"{place} cannot be used; check its disk, then try again.") from error


def _check(digest: str, actual: str) -> None:
    if actual != digest:
        raise DamagedBlob(
            f"Blob {digest} is damaged in the store: its bytes hash to {actual}. Restore it from "
            "a backup or upload it again.",
            digest=digest,
        )


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def blob_key(digest: str) -> str:
    """The key of a blob.

    Raises:
        NotFound: `digest` is not 64 lower-case hex digits.
    """
    if not _DIGEST.fullmatch(digest):
        raise NotFound(f"{digest!r} is not a SHA-256 digest, so no file has it.")
    return f"blobs/{digest}"


def work_key(key: str) -> str:
    """The key of a job's saved block.

    Raises:
        ValueError: `key` is not plain names separated by slashes.
    """
    if not _WORK_KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not a plain work key.")
    return f"work/{key}"


def parts_key(upload: str) -> str:
    """The prefix of an upload's parts."""
    return f"parts/{upload}"
