"""On-disk cache of blobs; every file is verified against its digest before use."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from deltadock.artifacts.checkpoint import CheckpointManifest, check_path
from deltadock.errors import DamagedBlob, InvalidCheckpoint
from deltadock.storage.blobs.port import BlobStore, sha256_of

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
        together take at most `limit` bytes of disk; those in use stay.
        """
        with self._lock(digest, fcntl.LOCK_SH) as lock:
            os.utime(lock)
            manifest = self._manifest(digest)
            self._make_room(digest, limit - manifest.total_bytes)
            yield self.checkpoint(digest)

    @contextmanager
    def _lock(self, digest: str, kind: int) -> Iterator[Path]:
        # Beside the folder and never removed, so that every process locks the same file.
        path = self._folder / "checkpoints" / f"{digest}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as stream:
            fcntl.flock(stream, kind)
            yield path

    def _make_room(self, wanted: str, limit: int) -> None:
        """Remove unused checkpoints, the oldest first, until all but `wanted` fit in `limit`."""
        used = [
            (path.stat().st_mtime, path.stem, disk_bytes(path.with_suffix("")))
            for path in (self._folder / "checkpoints").glob("*.lock")
            if path.stem != wanted
        ]
        total = sum(size for *_, size in used)
        for _, digest, size in sorted(used):
            if total <= limit:
                return
            with suppress(BlockingIOError), self._lock(digest, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(self._folder / "checkpoints" / digest, ignore_errors=True)
                total -= size

    def checkpoint(self, digest: str) -> tuple[Path, CheckpointManifest]:
        """The folder with a checkpoint's files, and its manifest, whose SHA-256 is `digest`.

        Raises:
            NotFound: the manifest or one of its files is not in the store.
            DamagedBlob: the stored bytes are damaged.
            InvalidCheckpoint: the blob is not a checkpoint manifest.
        """
        manifest = self._manifest(digest)
        folder = self._folder / "checkpoints" / digest
        for file in manifest.files:
            self._file(file.sha256, folder / check_path(file.path))
        return folder, manifest

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


def disk_bytes(folder: Path) -> int:
    """Bytes of a folder's files; hard links into a blob store take none."""
    found = (path.stat() for path in folder.rglob("*") if path.is_file())
    return sum(stat.st_size for stat in found if stat.st_nlink == 1)
