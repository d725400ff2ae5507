"""What is stored, by kind."""

from typing import Final, NamedTuple

from deltadock.storage.blobs import BlobStore
from deltadock.storage.blobs.port import Area
from deltadock.storage.database import Database
from deltadock.storage.repositories.blobs import BlobKind, BlobRepository, batches

WORK: Final = "work"
"""The kind of jobs' saved blocks."""


class Usage(NamedTuple):
    """A number of stored files, and their bytes."""

    files: int
    bytes: int

    def plus(self, size: int) -> "Usage":
        """With one file of `size` bytes more."""
        return Usage(self.files + 1, self.bytes + size)


UsageByKind = dict[str, Usage]


def measure(database: Database, blobs: BlobStore) -> UsageByKind:
    """What is stored, by kind: all files of the store, those of unfinished uploads among them."""
    usage: UsageByKind = {kind: Usage(0, 0) for kind in (*BlobKind, WORK)}
    areas: tuple[tuple[Area, str], ...] = (
        ("staging", BlobKind.UPLOADS), ("parts", BlobKind.UPLOADS), ("work", WORK),
    )  # fmt: skip
    for area, kind in areas:
        for entry in blobs.entries(area):
            usage[kind] = usage[kind].plus(entry.bytes)
    for entries in batches(blobs.entries("blobs")):
        with database.read_scope() as session:
            kinds = BlobRepository(session).needed([entry.key for entry in entries])
        for entry in entries:
            kind = kinds.get(entry.key, BlobKind.UNREFERENCED)
            usage[kind] = usage[kind].plus(entry.bytes)
    return usage
