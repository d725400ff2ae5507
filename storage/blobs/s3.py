"""Blobs in an S3 bucket (any S3-compatible store)."""

import math
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from deltadock.errors import NotFound, Unavailable
from deltadock.settings import Settings
from deltadock.storage.blobs.port import CHUNK_BYTES, BlobStore, BlobWriter, blob_key, work_key

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

MIN_PART_BYTES: Final = 16 << 20
MAX_PARTS: Final = 10_000
"""S3's limit on the parts of one object."""

PRESIGNED_SECONDS: Final = 300
"""Validity of presigned URLs; S3 checks it when a download starts, not while it runs."""

MISSING: Final = frozenset({"404", "NoSuchKey", "NotFound", "NoSuchBucket"})


class S3BlobStore(BlobStore):
    """A bucket; objects appear atomically."""

    def __init__(self, settings: Settings) -> None:
        self.bucket = settings.s3_bucket
        self.part_bytes = max(MIN_PART_BYTES, math.ceil(settings.max_file_bytes / MAX_PARTS))
        self.client = _client(settings, settings.s3_endpoint_url)
        # Signs URLs for the host that clients use.
        self._signer: S3Client | None = None
        if settings.s3_public_url is not None:
            self._signer = _client(settings, settings.s3_public_url)

    def prepare(self) -> None:
        with _errors():
            try:
                self.client.head_bucket(Bucket=self.bucket)
            except ClientError as error:
                if _code(error) not in MISSING:
                    raise
                self.client.create_bucket(Bucket=self.bucket)

    def writer(self) -> BlobWriter:
        return _S3Writer(self)

    def open(self, digest: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        size = self.size(digest)
        last = size if end is None else min(end, size)
        if start >= last:
            return iter(())
        with _errors():
            body = self.client.get_object(
                Bucket=self.bucket, Key=blob_key(digest), Range=f"bytes={start}-{last - 1}"
            )["Body"]
        return body.iter_chunks(CHUNK_BYTES)

    def size(self, digest: str) -> int:
        with _errors(f"The store holds no file {digest}."):
            return self.client.head_object(Bucket=self.bucket, Key=blob_key(digest))[
                "ContentLength"
            ]

    def presigned_url(self, digest: str, *, disposition: str, media_type: str) -> str | None:
        if self._signer is None:
            return None
        with _errors():
            return self._signer.generate_presigned_url(
                "get_object",
                Params={
                    "Bucket": self.bucket,
                    "Key": blob_key(digest),
                    "ResponseContentDisposition": disposition,
                    "ResponseContentType": media_type,
                },
                ExpiresIn=PRESIGNED_SECONDS,
            )

    def delete(self, digest: str) -> None:
        with _errors():
            self.client.delete_object(Bucket=self.bucket, Key=blob_key(digest))

    def get_work(self, key: str) -> bytes | None:
        try:
            with _errors("No such block."):
                return self.client.get_object(Bucket=self.bucket, Key=work_key(key))["Body"].read()
        except NotFound:
            return None

    def put_work(self, key: str, data: bytes) -> None:
        with _errors():
            self.client.put_object(Bucket=self.bucket, Key=work_key(key), Body=data)

    def drop_work(self, prefix: str) -> None:
        with _errors():
            for key, _ in self._list(f"{work_key(prefix)}/"):
                self.client.delete_object(Bucket=self.bucket, Key=key)

    def drop_staging(self, before: datetime) -> int:
        dropped = 0
        with _errors():
            for key, modified in self._list("staging/"):
                if modified < before:
                    self.client.delete_object(Bucket=self.bucket, Key=key)
                    dropped += 1
            pages = self.client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self.bucket, Prefix="staging/"):
                for upload in page.get("Uploads", []):
                    if upload["Initiated"] < before:
                        self.client.abort_multipart_upload(
                            Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                        )
                        dropped += 1
        return dropped

    def _list(self, prefix: str) -> Iterator[tuple[str, datetime]]:
        pages = self.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self.bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                yield entry["Key"], entry["LastModified"]

    def _place(self, digest: str, target: Path) -> None:
        with _errors(f"The store holds no file {digest}."):
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

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        self._buffer += chunk
        while len(self._buffer) >= self._store.part_bytes:
            self._send_part(bytes(self._buffer[: self._store.part_bytes]))
            del self._buffer[: self._store.part_bytes]

    def commit(self, digest: str) -> None:
        key = blob_key(digest)
        if self._store.exists(digest):
            return
        bucket = self._store.bucket
        if self._upload_id is None:
            with _errors():
                self._client.put_object(Bucket=bucket, Key=key, Body=bytes(self._buffer))
            return
        if self._buffer:
            self._send_part(bytes(self._buffer))
        with _errors():
            self._client.complete_multipart_upload(
                Bucket=bucket,
                Key=self._key,
                UploadId=self._upload_id,
                MultipartUpload={"Parts": self._parts},
            )
            self._staged, self._upload_id = True, None
            # boto3's managed copy: multipart for objects over S3's 5 GB limit on a single copy.
            self._client.copy({"Bucket": bucket, "Key": self._key}, bucket, key)

    def discard(self) -> None:
        self._buffer.clear()
        with _errors():
            if self._upload_id is not None:
                upload_id, self._upload_id = self._upload_id, None
                self._client.abort_multipart_upload(
                    Bucket=self._store.bucket, Key=self._key, UploadId=upload_id
                )
            if self._staged:
                self._staged = False
                self._client.delete_object(Bucket=self._store.bucket, Key=self._key)

    def _send_part(self, data: bytes) -> None:
        with _errors():
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
                Body=data,
            )
            self._parts.append({"PartNumber": number, "ETag": part["ETag"]})


def _client(settings: Settings, endpoint_url: str | None) -> "S3Client":
    secret = settings.s3_secret_access_key
    return boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key_id,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
        config=Config(
            # boto3 still presigns with Signature Version 2 in some regions by default.
            signature_version="s3v4",
            # Other S3 implementations reject or mangle boto3's default checksum headers, and
            # digests are verified here anyway.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "standard", "max_attempts": 4},
            connect_timeout=5,
            read_timeout=60,
            max_pool_connections=50,
            s3={"addressing_style": "path" if endpoint_url else "auto"},
        ),
    )


def _code(error: ClientError) -> str:
    return error.response.get("Error", {}).get("Code", "")


@contextmanager
def _errors(missing: str | None = None) -> Iterator[None]:
    """Translate boto's errors; a missing object raises NotFound(`missing`), if given."""
    try:
        yield
    except ClientError as error:
        if missing and _code(error) in MISSING:
            raise NotFound(missing) from error
        raise Unavailable("The object store refused a request; try again shortly.") from error
    except (BotoCoreError, Boto3Error) as error:
        raise Unavailable("The object store does not answer; try again shortly.") from error
