"""Imports by reference: files that this machine reads itself, from places the operator allows.

    file:///srv/models/tuned        a folder, or a calibration text, on this machine
    s3://bucket/prefix              objects of the configured S3 server, with its credentials
    hf://org/name@revision          a model on the Hugging Face Hub, with this machine's token

`DELTADOCK_IMPORT_SOURCES` lists the places, such as `["file:///srv/models", "s3://models/tuned",
"hf://org"]`; one of them allows itself and what is below it, and `hf://` every repository.

Whoever owns a place may write into it at any time, so each file is told by its version too.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from deltadock.artifacts.checkpoint import SHARD_INDEX, model_files
from deltadock.artifacts.folder import list_folder
from deltadock.errors import Forbidden, InvalidInput, NotFound, TooLarge, Unavailable
from deltadock.extras import needed_extras
from deltadock.settings import Settings
from deltadock.storage.blobs.port import CHUNK_BYTES
from deltadock.storage.tables import UploadKind

MAX_INDEX_BYTES: Final = 32 << 20
HUB_BLOCK_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file's size in bytes, and what is another string whenever its bytes may be others."""

    size: int
    version: str


class Source(Protocol):
    """A folder of files somewhere else."""

    def list(self) -> dict[str, SourceFile]:
        """Every file now, by its path inside the source.

        Raises:
            NotFound: there is no such place.
            Unavailable: it cannot be reached.
        """

    def read(self, path: str, file: SourceFile) -> Iterator[bytes]:
        """The bytes in chunks of a file that `list` returned.

        Raises:
            InvalidInput: it has changed since.
            NotFound: it is gone.
            Unavailable: as `list`.
        """


def changed(path: str) -> InvalidInput:
    """The error for a file that somebody writes while it is imported."""
    return InvalidInput(
        f"{path!r} changed while it was imported. When nothing writes there any more, complete the "
        "upload to try again."
    )


def open_source(uri: str, settings: Settings) -> Source:
    """The source that a URI names, if the operator allows it; connects to nothing yet.

    Raises:
        Forbidden: it is not allowed.
        InvalidInput: it is no source.
    """
    scheme, separator, place = uri.partition("://")
    allowed = [
        entry.removeprefix(f"{scheme}://").rstrip("/")
        for entry in settings.import_sources
        if entry.startswith(f"{scheme}://")
    ]
    if not separator or not allowed or not uri.isprintable():
        raise Forbidden(
            f"Imports from {uri!r} are not allowed here. The operator can allow places by "
            "DELTADOCK_IMPORT_SOURCES; otherwise upload the files."
        )
    if scheme == "file":
        return FolderSource(uri, Path(place), [Path(entry or "/") for entry in allowed])
    if not any(_is_below(place.partition("@")[0], entry) for entry in allowed):
        raise _not_allowed(uri)
    return S3Source(uri, place, settings) if scheme == "s3" else HubSource(uri, place)


def source_files(source: Source, kind: UploadKind) -> dict[str, SourceFile]:
    """The files of a source that belong to a checkpoint, or its one calibration text.

    Raises:
        InvalidCheckpoint: there is no checkpoint.
        InvalidInput, NotFound, Unavailable: as `Source.read`.
    """
    files = source.list()
    if kind is UploadKind.CALIBRATION:
        return files
    index = None
    if SHARD_INDEX in files:
        if files[SHARD_INDEX].size > MAX_INDEX_BYTES:
            raise TooLarge(f"{SHARD_INDEX} is larger than {MAX_INDEX_BYTES} bytes.")
        index = b"".join(source.read(SHARD_INDEX, files[SHARD_INDEX]))
    kept = model_files(files.keys(), index)
    return {path: file for path, file in sorted(files.items()) if path in kept}


def _is_below(place: str, allowed: str) -> bool:
    return not allowed or place == allowed or place.startswith(f"{allowed}/")


def _not_allowed(uri: str) -> Forbidden:
    return Forbidden(
        f"Imports from {uri!r} are not allowed here: it is outside every place that the operator "
        "lists in DELTADOCK_IMPORT_SOURCES."
    )


class FolderSource:
    """A folder or file on this machine. No symbolic link leads out of the allowed folders."""

    def __init__(self, uri: str, place: Path, allowed: list[Path]) -> None:
        self._uri = uri
        self._allowed = [entry.resolve() for entry in allowed]
        if not place.is_absolute() or ".." in place.parts:
            raise _not_allowed(uri)
        self._place = place
        self._check(place)

    def _check(self, path: Path) -> None:
        try:
            resolved = path.resolve()
        except RuntimeError as error:  # links that form a loop
            raise _not_allowed(self._uri) from error
        if not any(resolved.is_relative_to(entry) for entry in self._allowed):
            raise _not_allowed(self._uri)

    def list(self) -> dict[str, SourceFile]:
        with self._errors():
            if self._place.is_file():
                return {self._place.name: _stamp(self._place.stat())}
            if not self._place.is_dir():
                raise NotFound(f"There is no folder {self._uri!r}.")
            paths = {path: self._place / path for path in list_folder(self._place)}
            for path in paths.values():
                self._check(path)
            return {name: _stamp(path.stat()) for name, path in paths.items()}

    def read(self, path: str, file: SourceFile) -> Iterator[bytes]:
        target = self._place if self._place.is_file() else self._place / path
        with self._errors():
            # Not even for a moment a pipe or device; what was opened is checked, not the name.
            descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb") as stream:  # noqa: PTH123 - a descriptor
                self._check(Path(f"/proc/self/fd/{descriptor}"))
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise InvalidInput(f"{path!r} is not a regular file.")
                left = file.size
                while left > 0 and (chunk := stream.read(min(left, CHUNK_BYTES))):
                    left -= len(chunk)
                    yield chunk
                if _stamp(os.fstat(descriptor)) != file:
                    raise changed(path)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFound(f"A file of {self._uri!r} is gone.") from error
        except OSError as error:
            raise InvalidInput(f"{self._uri!r} cannot be read by the api.") from error


def _stamp(status: os.stat_result) -> SourceFile:
    """Copies and archives set the time of a file's bytes, but none of its last change."""
    times = f"{status.st_mtime_ns}-{status.st_ctime_ns}"
    return SourceFile(status.st_size, f"{status.st_ino}-{times}")


class S3Source:
    """The objects under a prefix, on the S3 server of the settings."""

    def __init__(self, uri: str, place: str, settings: Settings) -> None:
        # boto3 is slow to import.
        from deltadock.storage.blobs.s3_client import make_client

        self._bucket, _, prefix = place.partition("/")
        self._prefix = prefix.rstrip("/")
        self._uri = uri
        if settings.blob_store == "s3" and self._bucket == settings.s3_bucket:
            raise Forbidden("Deltadock's own bucket, which all tenants share, is no source.")
        self._client = make_client(settings, settings.s3_endpoint_url)
        self._keys: dict[str, str] = {}

    def list(self) -> dict[str, SourceFile]:
        from deltadock.storage.blobs.s3_client import s3_errors

        found: dict[str, SourceFile] = {}
        with s3_errors(f"There is no bucket {self._bucket!r}."):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
                for entry in page.get("Contents", []):
                    key = entry["Key"]
                    below = key.removeprefix(self._prefix)
                    if below and self._prefix and not below.startswith("/"):
                        continue  # only its name begins like the prefix
                    # The prefix may be one object, such as a text.
                    name = below.removeprefix("/") or key.rpartition("/")[2]
                    if not key.endswith("/"):
                        found[name] = SourceFile(entry["Size"], entry["ETag"])
                        self._keys[name] = key
        if not found:
            raise NotFound(f"There is no object under {self._uri!r}.")
        return found

    def read(self, path: str, file: SourceFile) -> Iterator[bytes]:
        from deltadock.storage.blobs.s3_client import read_object

        key = self._keys[path]
        return read_object(self._client, self._bucket, key, 0, file.size, etag=file.version)


class HubSource:
    """A model repository of the Hugging Face Hub at a revision."""

    def __init__(self, uri: str, place: str) -> None:
        self._uri = uri
        self._repository, _, revision = place.partition("@")
        self._revision = revision or "main"
        self._commit: str | None = None
        """What the revision meant at first; a branch may move while files are read."""
        if self._repository.count("/") != 1:
            raise InvalidInput(f"{uri!r} names no repository; write hf://org/name@revision.")

    def list(self) -> dict[str, SourceFile]:
        with self._errors():
            from huggingface_hub import HfApi, RepoFile

            if self._commit is None:
                self._commit = HfApi().model_info(self._repository, revision=self._revision).sha
            tree = HfApi().list_repo_tree(self._repository, recursive=True, revision=self._commit)
            return {
                entry.path: SourceFile(entry.size, entry.blob_id)
                for entry in tree
                if isinstance(entry, RepoFile)
                and not any(part.startswith(".") for part in entry.path.split("/"))
            }

    def read(self, path: str, file: SourceFile) -> Iterator[bytes]:
        with self._errors():
            from huggingface_hub import HfFileSystem

            hub = HfFileSystem(skip_instance_cache=True)
            with hub.open(
                f"{self._repository}/{path}",
                "rb",
                revision=self._commit,
                block_size=HUB_BLOCK_BYTES,
            ) as stream:
                left = file.size
                while left > 0 and (chunk := stream.read(min(left, CHUNK_BYTES))):
                    left -= len(chunk)
                    yield chunk

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with needed_extras("An import from the Hugging Face Hub"):
            from huggingface_hub import errors as hub
        try:
            yield
        except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as error:
            raise NotFound(
                f"There is no {self._uri!r}, or this machine's token may not read it."
            ) from error
        except (hub.HFValidationError, FileNotFoundError) as error:
            raise NotFound(f"There is no {self._uri!r}.") from error
        except (hub.HTTPError, OSError) as error:  # type: ignore[attr-defined] # httpx's
            raise Unavailable(
                f"{self._uri!r} cannot be imported: this machine does not reach the Hugging Face "
                "Hub, or is set to work offline (HF_HUB_OFFLINE). Upload the files instead."
            ) from error
