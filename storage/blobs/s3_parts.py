"""Parts on S3: a multipart upload each file, to which clients can send parts themselves."""

import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Final, Self

from botocore.exceptions import ClientError

from deltadock.errors import Conflict, NotFound
from deltadock.storage.blobs.parts import PartedFile, PartWriter
from deltadock.storage.blobs.s3_client import MISSING, as_body, code_of, s3_errors
from deltadock.storage.blobs.writer import Chunk

if TYPE_CHECKING:
    from deltadock.storage.blobs.s3 import S3BlobStore

URL_SECONDS: Final = 3600
"""Validity of a part's URL; S3 checks it when a part begins to arrive."""

GONE: Final = "The file's parts are no longer stored; send the file again."


class S3PartedFile(PartedFile):
    """A multipart upload; once sealed, an object under parts/. The token names both."""

    sent_whole = True

    def __init__(
        self, store: "S3BlobStore", prefix: str, token: str, size: int, part_bytes: int
    ) -> None:
        super().__init__(size, part_bytes)
        self.token = token
        self.store = store
        name, _, self.upload_id = token.partition(":")
        self.key = f"{prefix}/{name}"

    @classmethod
    def create(cls, store: "S3BlobStore", prefix: str, size: int, part_bytes: int) -> Self:
        """A new file without parts."""
        name = uuid.uuid4().hex
        with s3_errors():
            upload = store.client.create_multipart_upload(
                Bucket=store.bucket, Key=f"{prefix}/{name}"
            )
        return cls(store, prefix, f"{name}:{upload['UploadId']}", size, part_bytes)

    def writer(self, number: int) -> PartWriter:
        return _S3PartWriter(self, number)

    def url(self, number: int) -> str | None:
        if self.store.signer is None:
            return None
        with s3_errors():
            return self.store.signer.generate_presigned_url(
                "upload_part",
                Params={
                    "Bucket": self.store.bucket,
                    "Key": self.key,
                    "UploadId": self.upload_id,
                    "PartNumber": number,
                    "ContentLength": self.part_size(number),  # signed: no other is accepted
                },
                ExpiresIn=URL_SECONDS,
            )

    def arrived(self) -> frozenset[int]:
        if self._is_object():
            return frozenset(range(1, self.count + 1))
        return frozenset(self._tags())

    def _tags(self) -> dict[int, str]:
        """The ETag of every complete part: of the latest where a server lists all that came.

        Two of one second cannot be told apart; `publish` refuses the file if the wrong one wins.
        """
        tags: dict[int, tuple[datetime, str]] = {}
        pages = self.store.client.get_paginator("list_parts")
        with s3_errors(GONE):
            for page in pages.paginate(
                Bucket=self.store.bucket, Key=self.key, UploadId=self.upload_id
            ):
                for part in page.get("Parts", []):
                    number = part["PartNumber"]
                    if 1 <= number <= self.count and part["Size"] == self.part_size(number):
                        listed = (part["LastModified"], part["ETag"])
                        tags[number] = max(tags.get(number, listed), listed)
        return {number: tag for number, (_, tag) in tags.items()}

    def _is_object(self) -> bool:
        """Whether the parts are joined: the file is sealed."""
        try:
            with s3_errors(GONE):
                self.store.client.head_object(Bucket=self.store.bucket, Key=self.key)
        except NotFound:
            return False
        return True

    def seal(self) -> None:
        if self._is_object():
            return
        tags = self._tags()
        if len(tags) < self.count:
            self.check_complete()
        with s3_errors():
            try:
                self.store.client.complete_multipart_upload(
                    Bucket=self.store.bucket,
                    Key=self.key,
                    UploadId=self.upload_id,
                    MultipartUpload={
                        "Parts": [
                            {"PartNumber": number, "ETag": tag}
                            for number, tag in sorted(tags.items())
                        ]
                    },
                )
            except ClientError as error:
                # Of a request that was repeated because its answer was lost, or of two at once.
                if code_of(error) not in MISSING or not self._is_object():
                    raise

    def read(self, start: int, end: int) -> Iterator[bytes]:
        return self.store.read_object(self.key, start, end)

    def publish(self, digest: str, verify: Callable[[], None], alive: Callable[[], None]) -> None:
        if not self._is_object():
            raise NotFound(GONE)
        # The server copies while this process reads what it stores.
        with self.store.copy(self.key, digest) as copy:
            verify()
            copy.commit(alive)

    def drop(self) -> None:
        self.store.abort(self.key, self.upload_id)
        self.store.drop(self.key)


class _S3PartWriter(PartWriter):
    """Sends the part when it is complete; holds it in memory until then."""

    def __init__(self, file: S3PartedFile, number: int) -> None:
        super().__init__(number, file.part_size(number))
        self._file = file
        self._buffer = bytearray()

    def _write(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self._buffer += chunk

    def _commit(self) -> None:
        file = self._file
        with s3_errors(GONE):
            try:
                file.store.client.upload_part(
                    Bucket=file.store.bucket,
                    Key=file.key,
                    UploadId=file.upload_id,
                    PartNumber=self.number,
                    Body=as_body(self._buffer),
                )
            except ClientError as error:
                if code_of(error) in MISSING and file.arrived():
                    raise Conflict(
                        "The file is being completed and takes no more parts."
                    ) from error
                raise

    def discard(self) -> None:
        self._buffer.clear()
