"""Downloads a delta's file: verified, and continued where it broke off."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx

from deltadock.artifacts.checkpoint import CHUNK_BYTES
from deltadock.client.requests import POLL_SECONDS, RECONNECTS, domain_error
from deltadock.client.resources import Artifact
from deltadock.client.stopping import Stop
from deltadock.errors import HashMismatch

Progress = Callable[[str, int, int], None]


class Downloader:
    """Downloads files of deltas."""

    def __init__(
        self, open_at: Callable[[int], httpx.Response], progress: Progress, stop: Stop
    ) -> None:
        """`open_at` asks for a file's bytes from a place on; its answer is not read yet.

        `stop` ends the download, between two requests or chunks of the file.
        """
        self._open_at = open_at
        self._progress = progress
        self._stop = stop

    def download(self, name: str, artifact: Artifact, path: Path) -> None:
        """Download the artifact of a delta of this name to `path`.

        Raises:
            HashMismatch: the bytes do not match the digest; the partial file is removed.
            Unavailable: the connection broke; call again to resume.
        """
        # Named by the digest: an alias may have moved since the first part arrived.
        partial_path = path.with_name(f"{path.name}.{artifact.digest[:16]}.part")
        failures = 0
        while (received := _size(partial_path)) < artifact.bytes:
            try:
                for done in self._receive(partial_path, received):
                    failures = 0
                    self._progress(path.name, done, artifact.bytes)
            except httpx.RequestError as error:
                failures += 1
                if failures == RECONNECTS:
                    raise domain_error(error) from None
                self._stop.sleep(POLL_SECONDS)
        if (actual := self._digest(partial_path)) != artifact.digest:
            partial_path.unlink()
            raise HashMismatch(
                f"The download of {name} is damaged: its SHA-256 is {actual}, not "
                f"{artifact.digest}. Download it again."
            )
        partial_path.replace(path)

    def _receive(self, path: Path, start: int) -> Iterator[int]:
        """Append the bytes from `start` on to a file; yields its size after each chunk."""
        with closing(self._open_at(start)) as response:
            done = start if response.status_code == httpx.codes.PARTIAL_CONTENT else 0
            with path.open("ab" if done else "wb") as output:
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    output.write(chunk)
                    done += len(chunk)
                    yield done

    def _digest(self, path: Path) -> str:
        hashed = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                self._stop.check()
                hashed.update(chunk)
        return hashed.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
