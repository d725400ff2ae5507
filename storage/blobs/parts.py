"""Files that arrive in parts, in any order and in parallel, before they become blobs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from deltadock.errors import Conflict, InvalidInput
from deltadock.storage.blobs.writer import Chunk, Writer

MIN_PART_BYTES: Final = 16 << 20
MAX_PARTS: Final = 10_000
"""S3's limit on the parts of one object."""

_MEBIBYTE: Final = 1 << 20


def part_bytes_for(size: int) -> int:
    """Bytes of each part but the last, for a file of `size` bytes: whole MiB, 10,000 parts."""
    return max(MIN_PART_BYTES, math.ceil(size / MAX_PARTS / _MEBIBYTE) * _MEBIBYTE)


def is_parted(size: int) -> bool:
    """Whether a file of `size` bytes has more than one part; a smaller one is better sent whole."""
    return size > MIN_PART_BYTES


class PartWriter(Writer):
    """Streams one part into a file."""

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self._missing = size

    def write(self, *chunks: Chunk) -> None:
        """Append the chunks.

        Raises:
            Conflict: the part is longer than it should be, or the file takes no more parts.
        """
        self._missing -= sum(map(len, chunks))
        if self._missing < 0:
            raise Conflict(f"Part {self.number} is too long; see the upload's `part_bytes`.")
        self._write(chunks)

    def commit(self) -> None:
        """Add the part to the file, durably, in place of an earlier one with its number.

        Raises:
            Conflict: the part is too short, or the file takes no more parts.
        """
        if self._missing:
            raise Conflict(f"Part {self.number} lacks {self._missing} bytes; send all of it again.")
        self._commit()

    @abstractmethod
    def _write(self, chunks: Sequence[Chunk]) -> None: ...

    @abstractmethod
    def _commit(self) -> None: ...


class PartedFile(ABC):
    """A file of `size` bytes (at least 1) that arrives in parts of `part_bytes`, numbered from 1.

    Its life: parts are written; `seal` ends that; `publish` makes the bytes a blob; `drop` removes
    what is left. All but `drop` raise NotFound once the file is dropped.
    """

    token: str
    """Names it in the store, together with its upload."""
    sent_whole = False
    """Whether a writer holds its part in memory until it has all of it."""

    def __init__(self, size: int, part_bytes: int) -> None:
        self.size = size
        self.part_bytes = part_bytes
        self.count = math.ceil(size / part_bytes)

    def part_size(self, number: int) -> int:
        """Bytes of a part.

        Raises:
            InvalidInput: the file has no such part.
        """
        if not 1 <= number <= self.count:
            raise InvalidInput(f"The file has parts 1 to {self.count}, and no part {number}.")
        return min(self.part_bytes, self.size - (number - 1) * self.part_bytes)

    def reserve(self) -> None:
        """Reserve the file's space, where the store can.

        Raises:
            StorageFull: there is less.
        """
        return

    @abstractmethod
    def writer(self, number: int) -> PartWriter:
        """A writer for a part, through this process."""

    @abstractmethod
    def url(self, number: int) -> str | None:
        """A short-lived URL to which clients PUT a part; None if they cannot reach the store."""

    @abstractmethod
    def arrived(self) -> frozenset[int]:
        """The numbers of the complete parts."""

    def stamp(self, number: int) -> str | None:
        """A text that is another one whenever the part is written again.

        None: the part is missing, or the store cannot read it before the file is sealed.
        """
        return None

    def holds(self, stamps: Sequence[str]) -> bool:
        """Whether the sealed file's first parts are still those that had these stamps."""
        return not stamps

    @abstractmethod
    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Stored bytes `[start, end)` of a sealed file, or of parts that have a stamp."""

    @abstractmethod
    def seal(self) -> None:
        """Take no more parts; idempotent.

        Raises:
            Conflict: parts are missing.
        """

    @abstractmethod
    def publish(self, digest: str, verify: Callable[[], None], alive: Callable[[], None]) -> None:
        """Make the sealed bytes the blob `digest`, durably; idempotent.

        Args:
            digest: SHA-256 (hex) of the bytes, if `verify` raises nothing.
            verify: reads what is not known of the bytes; what it raises is raised here, and there
                is no blob then.
            alive: as `BlobWriter.commit`.
        """

    @abstractmethod
    def drop(self) -> None:
        """Remove the file and its parts. Raises nothing: the sweeper removes what is left."""

    def check_complete(self) -> None:
        """Raise Conflict if parts are missing."""
        if missing := sorted(set(range(1, self.count + 1)) - self.arrived()):
            raise Conflict(
                f"{len(missing)} of {self.count} parts are missing, such as number {missing[0]}. "
                "Send them, then complete the upload again."
            )
