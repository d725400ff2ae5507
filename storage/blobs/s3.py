"""Blobs in an S3 bucket (any S3-compatible store)."""

import math
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import structlog
from botocore.exceptions import ClientError

from deltadock.errors import DeltadockError, NotFound
from deltadock.settings import Settings
from deltadock.storage.blobs.parts import MAX_PARTS, MIN_PART_BYTES, PartedFile
from deltadock.storage.blobs.port import (
    Area,
    BlobStore,
    BlobWriter,
    StoredEntry,
    blob_key,
    nobody_waits,
    parts_key,
    work_key,
)
from deltadock.storage.blobs.s3_client import (
    CONFLICT,
    EXISTS,
    MISSING,
    as_body,
    code_of,
    make_client,
    read_object,
    s3_errors,
)
from deltadock.storage.blobs.s3_parts import S3PartedFile
from deltadock.storage.blobs.writer import Chunk

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, ObjectTypeDef

COPY_BYTES: Final = 256 << 20
"""Of one server-side copy; S3 allows 5 GB, and copies ranges in parallel."""
COPY_THREADS: Final = 4
DELETED_AT_ONCE: Final = 1000
"""What S3 allows."""

PRESIGNED_SECONDS: Final = 300
"""Validity of presigned URLs; S3 checks it when a download starts, not while it runs."""

log = structlog.get_logger(__name__)


class S3BlobStore(BlobStore):
    """A bucket; objects appear atomically."""

    def __init__(self, settings: Settings) -> None:
        self.bucket = settings.s3_bucket
        self.buffer_bytes = max(MIN_PART_BYTES, math.ceil(settings.max_file_bytes / MAX_PARTS))
        self.client = make_client(settings, settings.s3_endpoint_url)
        # Signs URLs for the host that clients use.
        self.signer: S3Client | None = None
        if settings.s3_public_url is not None:
            self.signer = make_client(settings, settings.s3_public_url)

    def prepare(self) -> None:
        with s3_errors():
            try:
                self.client.head_bucket(Bucket=self.bucket)
            except ClientError as error:
                if code_of(error) not in MISSING:
                    raise
                self.client.create_bucket(Bucket=self.bucket)
        if not self.is_conditional:
            log.warning(
                "s3_without_conditional_writes",
                effect="Two writers of one blob may both write it; the bytes are the same.",
            )

    @cached_property
    def is_conditional(self) -> bool:
        """Whether the server refuses to overwrite an object when asked to (`If-None-Match: *`)."""
        key = f"staging/{uuid.uuid4().hex}"
        with s3_errors():
            try:
                for _ in range(2):
                    self.client.put_object(Bucket=self.bucket, Key=key, IfNoneMatch="*")
            except ClientError as error:
                if code_of(error) in EXISTS:
                    return True
                if code_of(error) not in {"501", "NotImplemented", "InvalidArgument"}:
                    raise
            finally:
                self.client.delete_object(Bucket=self.bucket, Key=key)
        return False

    def writer(self) -> BlobWriter:
        return _S3Writer(self)

    def open(self, digest: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        size = self.size(digest)
        last = size if end is None else min(end, size)
        return self.read_object(blob_key(digest), start, last)

    def read_object(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """Bytes `[start, end)` of an object."""
        return read_object(self.client, self.bucket, key, start, end)

    def size(self, digest: str) -> int:
        with s3_errors(f"The store holds no file {digest}."):
            return self.client.head_object(Bucket=self.bucket, Key=blob_key(digest))[
                "ContentLength"
            ]

    def begin_parts(self, upload: str, size: int, part_bytes: int) -> PartedFile:
        return S3PartedFile.create(self, parts_key(upload), size, part_bytes)

    def parted(self, upload: str, token: str, size: int, part_bytes: int) -> PartedFile:
        return S3PartedFile(self, parts_key(upload), token, size, part_bytes)

    def parted_uploads(self) -> frozenset[str]:
        prefix = parts_key("")
        with s3_errors():
            keys = [key for key, _ in self._list(prefix)]
            keys += [key for key, *_ in self._multipart_uploads(prefix)]
        return frozenset(key.removeprefix(prefix).partition("/")[0] for key in keys)

    def drop_parts(self, upload: str) -> None:
        prefix = f"{parts_key(upload)}/"
        with s3_errors():
            for key, upload_id, _ in self._multipart_uploads(prefix):
                self.abort(key, upload_id)
            self._delete(key for key, _ in self._list(prefix))

    def presigned_url(self, digest: str, *, disposition: str, media_type: str) -> str | None:
        if self.signer is None:
            return None
        with s3_errors():
            return self.signer.generate_presigned_url(
                "get_object",
                Params={
                    "Bucket": self.bucket,
                    "Key": blob_key(digest),
                    "ResponseContentDisposition": disposition,
                    "ResponseContentType": media_type,
                },
                ExpiresIn=PRESIGNED_SECONDS,
            )

    def delete(self, *digests: str) -> None:
        with s3_errors():
            self._delete(map(blob_key, digests))

    def _delete(self, keys: Iterable[str]) -> None:
        """Delete objects, many in a request."""
        left = iter(keys)
        while batch := list(islice(left, DELETED_AT_ONCE)):
            answer = self.client.delete_objects(
                Bucket=self.bucket,
                Delete={"Objects": [{"Key": key} for key in batch], "Quiet": True},
            )
            for failed in answer.get("Errors", []):
                if failed.get("Code") not in MISSING:
                    code, message = failed.get("Code", ""), failed.get("Message", "")
                    raise ClientError(
                        {"Error": {"Code": code, "Message": message}}, "DeleteObjects"
                    )

    def get_work(self, key: str) -> bytes | None:
        try:
            with s3_errors("No such block."):
                size = self.client.head_object(Bucket=self.bucket, Key=work_key(key))
                return b"".join(self.read_object(work_key(key), 0, size["ContentLength"]))
        except NotFound:
            return None

    def put_work(self, key: str, data: bytes) -> None:
        with s3_errors():
            self.client.put_object(Bucket=self.bucket, Key=work_key(key), Body=data)

    def drop_work(self, prefix: str) -> None:
        with s3_errors():
            self._delete(key for key, _ in self._list(f"{work_key(prefix)}/"))

    def drop_staging(self, before: datetime) -> int:
        dropped = 0
        with s3_errors():
            for key, modified in self._list("staging/"):
                if modified < before:
                    self.client.delete_object(Bucket=self.bucket, Key=key)
                    dropped += 1
            for key, upload_id, begun in self._multipart_uploads(""):
                if begun < before and not key.startswith(parts_key("")):
                    self.abort(key, upload_id)
                    dropped += 1
        return dropped

    def abort(self, key: str, upload_id: str) -> None:
        """Drop an unfinished multipart upload; if the server fails, the sweeper does later."""
        try:
            with s3_errors("It is gone."):
                self.client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload_id)
        except NotFound:
            pass
        except DeltadockError as error:
            log.warning("multipart_upload_not_dropped", key=key, error=error.message)

    def drop(self, key: str) -> None:
        """Delete a staged object; if the server fails, the sweeper does later."""
        try:
            with s3_errors():
                self.client.delete_object(Bucket=self.bucket, Key=key)
        except DeltadockError as error:
            log.warning("staged_object_not_dropped", key=key, error=error.message)

    def copy(self, source: str, digest: str) -> "Copy":
        """Begin to copy the object `source` to a blob; a context manager."""
        return Copy(self, source, digest)

    def create(self, digest: str, write: Callable[..., object], alive: Callable[[], None]) -> bool:
        """Make a blob by a request that takes `IfNoneMatch`; returns False if it exists undamaged.

        `alive`: as `BlobWriter.commit`.
        """
        exists = self.exists(digest)
        if exists and self.is_intact(digest, alive):
            return False
        overwrites = exists or not self.is_conditional
        with s3_errors():
            try:
                write() if overwrites else write(IfNoneMatch="*")
            except ClientError as error:
                if code_of(error) in EXISTS or (code_of(error) in CONFLICT and self.exists(digest)):
                    return False
                raise
        return True

    def entries(self, area: Area) -> Iterator[StoredEntry]:
        with s3_errors():
            for entry in self._objects(f"{area}/"):
                key = entry["Key"].removeprefix(f"{area}/")
                yield StoredEntry(key, entry["Size"], entry["LastModified"])

    def _list(self, prefix: str) -> Iterator[tuple[str, datetime]]:
        for entry in self._objects(prefix):
            yield entry["Key"], entry["LastModified"]

    def _objects(self, prefix: str) -> Iterator["ObjectTypeDef"]:
        pages = self.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self.bucket, Prefix=prefix):
            yield from page.get("Contents", [])

    def _multipart_uploads(self, prefix: str) -> Iterator[tuple[str, str, datetime]]:
        """(key, id, begun at) of the unfinished ones."""
        pages = self.client.get_paginator("list_multipart_uploads")
        for page in pages.paginate(Bucket=self.bucket, Prefix=prefix):
            for upload in page.get("Uploads", []):
                yield upload["Key"], upload["UploadId"], upload["Initiated"]

    def _place(self, digest: str, target: Path) -> None:
        with s3_errors(f"The store holds no file {digest}."):
            self.client.download_file(self.bucket, blob_key(digest), str(target))
        target.chmod(0o444)


class _S3Writer(BlobWriter):
    """A multipart upload under staging/, copied to its final key by the store.

    A blob that fits into one part is put directly, once its digest is known.
    """

    def __init__(self, store: S3BlobStore) -> None:
        self._store = store
        self._client = store.client
        self._key = f"staging/{uuid.uuid4().hex}"
        self._buffer = bytearray()
        self._upload_id: str | None = None
        self._staged = False
        self._parts: list[CompletedPartTypeDef] = []

    def write(self, *chunks: Chunk) -> None:
        for chunk in chunks:
            self._buffer += chunk
        size = self._store.buffer_bytes
        while len(self._buffer) >= size:
            part, self._buffer = self._buffer[:size], self._buffer[size:]
            self._send_part(part)

    def commit(self, digest: str, alive: Callable[[], None] = nobody_waits) -> None:
        if self._upload_id is None:
            self._store.create(
                digest,
                partial(
                    self._client.put_object,
                    Bucket=self._store.bucket,
                    Key=blob_key(digest),
                    Body=as_body(self._buffer),
                ),
                alive,
            )
            return
        if self._buffer:
            self._send_part(self._buffer)
        with s3_errors():
            self._client.complete_multipart_upload(
                Bucket=self._store.bucket,
                Key=self._key,
                UploadId=self._upload_id,
                MultipartUpload={"Parts": self._parts},
            )
        self._staged, self._upload_id = True, None
        with self._store.copy(self._key, digest) as copy:
            copy.commit(alive)

    def discard(self) -> None:
        self._buffer.clear()
        if self._upload_id is not None:
            self._store.abort(self._key, self._upload_id)
        if self._staged:
            self._store.drop(self._key)
        self._upload_id, self._staged = None, False

    def _send_part(self, data: bytearray) -> None:
        with s3_errors():
            if self._upload_id is None:
                self._upload_id = self._client.create_multipart_upload(
                    Bucket=self._store.bucket, Key=self._key
                )["UploadId"]
            number = len(self._parts) + 1
            part = self._client.upload_part(
                Bucket=self._store.bucket,
                Key=self._key,
                UploadId=self._upload_id,
                PartNumber=number,
                Body=as_body(data),
            )
            self._parts.append({"PartNumber": number, "ETag": part["ETag"]})


class Copy:
    """A server-side copy of an object to a blob; the blob appears when it is committed.

    In parts: a single copy is limited to 5 GB, and not every server makes it conditional.
    """

    def __init__(self, store: S3BlobStore, source: str, digest: str) -> None:
        self._store = store
        self._client = store.client
        self._source = source
        self._digest = digest
        self._key = blob_key(digest)

    def __enter__(self) -> Self:
        bucket = self._store.bucket
        with s3_errors():
            size = self._client.head_object(Bucket=bucket, Key=self._source)["ContentLength"]
            created = self._client.create_multipart_upload(Bucket=bucket, Key=self._key)
        self._upload_id = created["UploadId"]
        self._committed = False
        self._pool = ThreadPoolExecutor(COPY_THREADS, "copy")
        ends = [*range(COPY_BYTES, size, COPY_BYTES), size]
        self._parts = [
            self._pool.submit(self._copy_part, number, end)
            for number, end in enumerate(ends, start=1)
        ]
        return self

    def _copy_part(self, number: int, end: int) -> "CompletedPartTypeDef":
        with s3_errors():
            copied = self._client.upload_part_copy(
                Bucket=self._store.bucket,
                Key=self._key,
                UploadId=self._upload_id,
                PartNumber=number,
                CopySource={"Bucket": self._store.bucket, "Key": self._source},
                CopySourceRange=f"bytes={(number - 1) * COPY_BYTES}-{end - 1}",
            )
        return {"PartNumber": number, "ETag": copied["CopyPartResult"]["ETag"]}

    def commit(self, alive: Callable[[], None]) -> None:
        """Wait for the copy and make the blob visible, unless it exists undamaged."""
        parts = [part.result() for part in self._parts]
        self._committed = self._store.create(
            self._digest,
            partial(
                self._client.complete_multipart_upload,
                Bucket=self._store.bucket,
                Key=self._key,
                UploadId=self._upload_id,
                MultipartUpload={"Parts": parts},
            ),
            alive,
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        if not self._committed:
            self._store.abort(self._key, self._upload_id)
