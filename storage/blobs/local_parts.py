"""Parts in a local folder: written into one file at their offsets.

parts/<upload>/<token>/data     the file's bytes
parts/<upload>/<token>/<n>      exists while part n is complete; its text is the part's stamp
parts/<upload>/<token>/<n>.*    the same of one that is being written, or whose writer was killed
"""

import ctypes
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from glob import iglob
from pathlib import Path
from typing import Final, Self

from deltadock.errors import Conflict, DeltadockError, NotFound
from deltadock.storage.blobs.parts import PartedFile, PartWriter
from deltadock.storage.blobs.port import CHUNK_BYTES, disk_errors
from deltadock.storage.blobs.writer import Chunk

MAX_CHUNKS: Final = 1024
"""Of one writev(2)."""
RESERVED_SHARE: Final = 0.5
"""Of the disk, for all files that arrive in parts: who announces files need never send them."""


def store_errors() -> AbstractContextManager[None]:
    """Translate the errors of the store's disk."""
    return disk_errors("The blob store's folder")


def write_at(descriptor: int, chunks: Sequence[Chunk], offset: int) -> int:
    """Write all chunks, one after another; returns how many bytes they have."""
    left = [memoryview(chunk) for chunk in chunks if chunk]
    start = offset
    while left:
        written = os.pwritev(descriptor, left[:MAX_CHUNKS], offset)
        offset += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]
    return offset - start


def reserve(descriptor: int, size: int, others: int) -> None:
    """Reserve a file's space on the disk, if its file system can do so without writing zeros.

    Parts that are written and synced side by side then take half the time. Where this file and
    the `others`' bytes are more than `RESERVED_SHARE`, it grows with its parts instead.

    Raises:
        OSError: the disk has less (ENOSPC).
    """
    disk = os.fstatvfs(descriptor)
    if disk.f_bavail * disk.f_frsize < size:  # without filling it up to find out
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if others + size > RESERVED_SHARE * disk.f_blocks * disk.f_frsize:
        return
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:  # not Linux
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while fallocate(descriptor, 0, 0, size):
        error = ctypes.get_errno()
        if error in {errno.EOPNOTSUPP, errno.ENOSYS}:
            return
        if error != errno.EINTR:
            raise OSError(error, os.strerror(error))


class LocalPartedFile(PartedFile):
    """A data file, read-only once it is sealed, and a marker per complete part."""

    def __init__(
        self, folder: Path, token: str, size: int, part_bytes: int, place: Callable[..., None]
    ) -> None:
        """`folder` is the upload's; `place(data, digest, alive)` gives the data a blob's name."""
        super().__init__(size, part_bytes)
        self.token = token
        self.folder = folder / token
        self.data = self.folder / "data"
        self._place = place

    @classmethod
    def create(cls, folder: Path, size: int, part_bytes: int, place: Callable[..., None]) -> Self:
        """A new file without parts."""
        file = cls(folder, uuid.uuid4().hex, size, part_bytes, place)
        with store_errors():
            file.folder.mkdir(parents=True)
            file.data.touch()
        return file

    def reserve(self) -> None:
        with store_errors(), _found(), self.data.open("r+b") as stream:
            reserve(stream.fileno(), self.size, _allocated(self.folder.parent.parent))

    def writer(self, number: int) -> PartWriter:
        return _LocalPartWriter(self, number)

    def url(self, number: int) -> str | None:
        return None

    def arrived(self) -> frozenset[int]:
        with store_errors(), _found():
            names = [path.name for path in self.folder.iterdir()]
            return frozenset(int(name) for name in names if name.isdecimal())

    def marker(self, number: int) -> Path:
        """The file that exists while the part is complete."""
        return self.folder / str(number)

    def seal(self) -> None:
        with (
            store_errors(),
            _found(),
            self.data.open("rb") as stream,
            # Waits for writes that are under way; later ones find the file sealed.
            locked(stream.fileno(), fcntl.LOCK_EX),
        ):
            if not is_sealed(stream.fileno()):
                self.check_complete()
                self.data.chmod(0o444)

    def stamp(self, number: int) -> str | None:
        with store_errors():
            try:
                return self.marker(number).read_text(encoding="ascii") or None
            except FileNotFoundError:
                return None

    def holds(self, stamps: Sequence[str]) -> bool:
        with store_errors(), _found():
            names = {path.name for path in self.folder.iterdir()} - {self.data.name}
            if not all(name.isdecimal() for name in names):
                return False  # bytes of a killed writer may have come after a stamp
            # A marker is newer than its part's bytes: what is newer than all was written by others.
            marked = max(self.marker(int(name)).stat().st_mtime_ns for name in names)
            return self.data.stat().st_mtime_ns <= marked and all(
                self.stamp(number) == stamp for number, stamp in enumerate(stamps, start=1)
            )

    def read(self, start: int, end: int) -> Iterator[bytes]:
        with store_errors(), _found(), self.data.open("rb", buffering=0) as stream:
            stream.seek(start)
            while start < end and (chunk := stream.read(min(end - start, CHUNK_BYTES))):
                start += len(chunk)
                yield chunk

    def publish(self, digest: str, verify: Callable[[], None], alive: Callable[[], None]) -> None:
        verify()
        with store_errors(), _found():
            self._place(self.data, digest, alive)

    def drop(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class _LocalPartWriter(PartWriter):
    """Writes at the part's offset, unless the file is sealed."""

    def __init__(self, file: LocalPartedFile, number: int) -> None:
        super().__init__(number, file.part_size(number))
        self._file = file
        self._offset = (number - 1) * file.part_bytes
        with store_errors(), _found():
            try:
                self._stream = file.data.open("r+b", buffering=0)
            except PermissionError as error:
                raise _sealed() from error
        stamp = uuid.uuid4().hex
        self._marker = file.marker(number)
        self._begun = file.folder / f"{number}.{stamp}"
        self._has_written = False
        try:
            with store_errors(), self._unsealed():
                self._begun.write_text(stamp, encoding="ascii")
                # From its first new byte until it is complete again, the part is missing.
                self._marker.unlink(missing_ok=True)
        except DeltadockError:
            self.discard()
            raise

    def _write(self, chunks: Sequence[Chunk]) -> None:
        self._has_written = True
        with store_errors(), self._unsealed():
            self._offset += write_at(self._stream.fileno(), chunks, self._offset)

    def _commit(self) -> None:
        with store_errors(), _found():
            os.fdatasync(self._stream.fileno())
            with self._unsealed():
                os.utime(self._begun)
                self._begun.replace(self._marker)
                self._has_written = False

    def discard(self) -> None:
        self._stream.close()
        with suppress(OSError):
            if self._has_written:  # perhaps after another writer completed the part
                self._marker.unlink(missing_ok=True)
            self._begun.unlink(missing_ok=True)

    @contextmanager
    def _unsealed(self) -> Iterator[None]:
        with locked(self._stream.fileno(), fcntl.LOCK_SH):
            if is_sealed(self._stream.fileno()):
                raise _sealed()
            yield


@contextmanager
def locked(descriptor: int, kind: int) -> Iterator[None]:
    """Hold a lock on an open file; writers of parts share it."""
    fcntl.flock(descriptor, kind)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _allocated(parts: Path) -> int:
    """Bytes that the files in this folder of uploads take on the disk."""
    total = 0
    # Path.glob raises if an upload's folder is dropped meanwhile.
    for data in iglob("*/*/data", root_dir=parts):  # noqa: PTH207
        with suppress(FileNotFoundError):
            total += (parts / data).stat().st_blocks * 512  # stat(2)'s unit
    return total


def is_sealed(descriptor: int) -> bool:
    """Whether the file takes no more parts."""
    return not os.fstat(descriptor).st_mode & 0o200


def _sealed() -> Conflict:
    return Conflict("The file is being completed and takes no more parts.")


@contextmanager
def _found() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound("The file's parts are no longer stored; send the file again.") from error
