"""The file of a delta that is named by its path, its digest, or its name in a registry."""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from deltadock.client.blocking import Client
from deltadock.client.cache import cached, fetch_cached
from deltadock.client.routes import is_reference
from deltadock.errors import InvalidInput, NotFound
from deltadock.names import DIGEST


class DeltaFile(NamedTuple):
    """A delta on this machine's disk."""

    path: Path
    digest: str
    """SHA-256 of the file."""


def fetch(delta: str) -> DeltaFile:
    """The file of `delta`: a file's path, or what `fetch_registered` takes.

    Raises:
        NotFound: there is no such file, nor such a delta.
        InvalidInput, NotReady, HashMismatch, Unavailable: as `fetch_registered`.
    """
    if (path := Path(delta)).is_file():
        return DeltaFile(path, _sha256(path))
    if delta.endswith(".delta"):
        raise NotFound(f"There is no file {delta} on this machine.")
    return fetch_registered(delta)


def fetch_registered(delta: str) -> DeltaFile:
    """The file of a delta of the registry, downloaded if need be.

    The registry is the one to which `DELTADOCK_API_URL` and `DELTADOCK_API_KEY` lead. Files are
    kept in the user's cache under their digests, and hashed at every use.

    Args:
        delta: an artifact's digest, or a delta's name or id.

    Raises:
        InvalidInput: it is none of these.
        NotFound: the registry has no such delta for this key.
        NotReady: its compression is unfinished or failed.
        HashMismatch: the bytes that came have another digest.
        Unavailable: the registry does not answer.
    """
    if re.fullmatch(DIGEST, delta):
        held = cached(delta)
        return _download(delta) if held is None else DeltaFile(held, delta)
    if not is_reference(delta):
        raise InvalidInput(
            f"{delta!r} is neither the digest of a delta (64 hex digits) nor a name such as "
            "project/model, project/model:3 or project/model@alias."
        )
    return _download(delta)


def local_copy(path: str) -> Path:
    """The file, or on a machine that lacks it the registry's of the digest that it is named by.

    Raises:
        NotFound: there is neither.
        HashMismatch, Unavailable: as `fetch_registered`.
    """
    if (file := Path(path)).is_file():
        return file
    if re.fullmatch(DIGEST, file.stem):
        return fetch_registered(file.stem).path
    raise NotFound(f"There is no file {path} on this machine.")


def _download(reference: str) -> DeltaFile:
    with Client() as client:
        path = fetch_cached(client, reference)
    return DeltaFile(path, path.stem)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
