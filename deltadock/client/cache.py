"""The user's cache of downloaded deltas: a file a digest, hashed again at every use.

What changed on the disk since is downloaded anew.
"""

import fcntl
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltadock.client.blocking import Client


def cached_path(digest: str) -> Path:
    """Where the file with this SHA-256 (hex) is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "deltadock" / f"{digest}.delta"


def cached(digest: str) -> Path | None:
    """The cached file, if its bytes still have the digest; else it is removed."""
    path = cached_path(digest)
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() == digest:
            return path
    path.unlink(missing_ok=True)
    return None


def fetch_cached(client: "Client", reference: str) -> Path:
    """The file of what a delta's name, id or digest means now, downloaded if need be.

    Raises:
        NotFound: the server has no such delta for this key.
        NotReady: its compression is unfinished or failed.
        HashMismatch: the bytes that came have another digest.
        Unavailable: the server does not answer.
    """
    found = client.resolve(reference)
    path = cached_path(found.digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes of one machine may want it: the first downloads it.
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if cached(found.digest) is None:
            client.download(found.delta, path)
    return path
