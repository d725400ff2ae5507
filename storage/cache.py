"""On-disk cache of blobs; every file is verified against its digest before use."""

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple, Self, TextIO

from deltadock.artifacts.checkpoint import CheckpointManifest, check_path
from deltadock.errors import DamagedBlob, InvalidCheckpoint
from deltadock.storage.blobs.port import CACHE, BlobStore, disk_errors, sha256_of

MANIFEST_BYTES: Final = 64 * 2**20
"""Maximum size of a checkpoint manifest."""


class FileCache:
    """Checkpoints and artifacts under `folder`, by digest. All calls block."""

    def __init__(
        self,
        blobs: BlobStore,
        folder: Path,
        found_damaged: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`found_damaged` is called with the digest of each blob that the store has damaged."""
        self._blobs = blobs
        self._folder = folder
        self._found_damaged = found_damaged
        self._verified: dict[Path, _Stamp | None] = {}
        """Files of checkpoints whose fetching was broken off, so that a retry goes on there."""

    def artifact(self, digest: str) -> Path:
        """The artifact's file.

        Raises:
            NotFound: the artifact is not in the store.
            DamagedBlob: the stored bytes are damaged.
        """
        return self._file(digest, self._artifact(digest))

    def artifact_size(self, digest: str) -> int:
        """Size in bytes of the artifact in the store.

        Raises:
            NotFound: the artifact is not in the store.
        """
        return self._blobs.size(digest)

    def artifacts(self) -> list[tuple[str, int]]:
        """(digest, bytes) of the cached artifact files, oldest first; unverified."""
        paths = list(self._artifact("*").parent.glob(self._artifact("*").name))
        found = [(path.stat().st_mtime, path.stem, path.stat().st_size) for path in paths]
        return [(digest, size) for _, digest, size in sorted(found)]

    def remove_artifact(self, digest: str) -> None:
        """Remove an artifact's file, if cached; open file handles stay readable."""
        self._artifact(digest).unlink(missing_ok=True)

    def _artifact(self, digest: str) -> Path:
        return self._folder / "artifacts" / f"{digest}.safetensors"

    @contextmanager
    def held_checkpoint(self, digest: str, limit: int) -> Iterator[tuple[Path, CheckpointManifest]]:
        """A checkpoint that no process removes within the `with` block; see `checkpoint`.

        Before it is fetched, the checkpoints that were used least recently are removed, so that all
        together, with those that other processes are fetching, take at most `limit` bytes of disk;
        those in use stay.

        Raises:
            StorageFull, Unavailable: the disk is full, or cannot be written.
            NotFound, DamagedBlob, InvalidCheckpoint: as `checkpoint`.
        """
        lock = self._lock_of(digest)
        with self._lock(lock, fcntl.LOCK_SH) as held:
            manifest = self._manifest(digest)
            if not all(path.is_file() for path in self._paths(digest, manifest)):
                self._reserve(lock, digest, manifest.total_bytes, limit)
            try:
                fetched = self.checkpoint(digest)
            except BaseException:
                with suppress(BlockingIOError):  # who else fetches it needs the room
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    lock.write_text("")
                raise
            lock.write_text("")
            yield fetched

    def _lock_of(self, digest: str) -> Path:
        """What users of a checkpoint lock; it holds the bytes that are being fetched, if any.

        Beside the folder and never removed, so that every process locks the same file. Each use
        empties it, which sets its time, that of the last use; one that fails does so if no other
        process uses the checkpoint.
        """
        return self._folder / "checkpoints" / f"{digest}.lock"

    @contextmanager
    def _lock(self, path: Path, kind: int) -> Iterator[TextIO]:
        with disk_errors(CACHE):
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = path.open("a")
        with stream:
            fcntl.flock(stream, kind)
            yield stream

    def _reserve(self, lock: Path, digest: str, size: int, limit: int) -> None:
        """Make room for a checkpoint, and let the others know that it comes."""
        with self._lock(self._folder / "room.lock", fcntl.LOCK_EX), disk_errors(CACHE):
            self._make_room(digest, limit - size)
            lock.write_text(str(size))

    def _make_room(self, wanted: str, limit: int) -> None:
        """Remove unused checkpoints, the oldest first, until all but `wanted` fit in `limit`."""
        used = [
            (
                lock.stat().st_mtime,
                lock,
                max(disk_bytes(lock.with_suffix("")), int(lock.read_text() or 0)),
            )
            for lock in (self._folder / "checkpoints").glob("*.lock")
            if lock.stem != wanted
        ]
        total = sum(size for *_, size in used)
        for _, lock, size in sorted(used):
            if total <= limit:
                return
            with suppress(BlockingIOError), self._lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.write_text("")  # whoever was fetching it was killed
                total -= size

    def checkpoint(self, digest: str) -> tuple[Path, CheckpointManifest]:
        """The folder with a checkpoint's files, and its manifest, whose SHA-256 is `digest`.

        Raises:
            NotFound: the manifest or one of its files is not in the store.
            DamagedBlob: the stored bytes are damaged.
            InvalidCheckpoint: the blob is not a checkpoint manifest.
        """
        manifest = self._manifest(digest)
        paths = self._paths(digest, manifest)
        for path, sha256 in paths.items():
            stamp = self._verified.get(path)
            if stamp is None or stamp != _Stamp.of(path):
                self._verified[path] = _Stamp.of(self._file(sha256, path))
        for path in paths:
            self._verified.pop(path, None)
        return self._folder / "checkpoints" / digest, manifest

    def _paths(self, digest: str, manifest: CheckpointManifest) -> dict[Path, str]:
        """The files of a checkpoint, with the SHA-256 of each."""
        folder = self._folder / "checkpoints" / digest
        return {folder / check_path(file.path): file.sha256 for file in manifest.files}

    def _manifest(self, digest: str) -> CheckpointManifest:
        with self._telling_damage():
            manifest_json = self._blobs.read(digest, MANIFEST_BYTES)
        try:
            return CheckpointManifest.from_json(manifest_json)
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidCheckpoint(f"{digest} is not a checkpoint.") from error

    def _file(self, digest: str, path: Path) -> Path:
        """`path`, fetched from the store unless it already has the bytes of `digest`."""
        if not path.is_file() or sha256_of(path) != digest:
            with self._telling_damage():
                self._blobs.fetch(digest, path)
        return path

    @contextmanager
    def _telling_damage(self) -> Iterator[None]:
        try:
            yield
        except DamagedBlob as error:
            if error.digest is not None:
                self._found_damaged(error.digest)
            raise


class _Stamp(NamedTuple):
    """Another one whenever the file is another, or is written to."""

    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> Self | None:
        """The stamp of this file, if it is there."""
        try:
            stat = path.stat()
        except FileNotFoundError:
            return None
        return cls(stat.st_ino, stat.st_size, stat.st_mtime_ns)


def disk_bytes(folder: Path) -> int:
    """Bytes of a folder's files; hard links into a blob store take none."""
    found = (path.stat() for path in folder.rglob("*") if path.is_file())
    return sum(stat.st_size for stat in found if stat.st_nlink == 1)
