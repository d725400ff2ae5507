"""Requests to S3: the client with its retries, and what its errors mean."""

import base64
import hashlib
import random
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, cast

import boto3
from boto3.exceptions import Boto3Error
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from deltadock.errors import NotFound, StorageFull, Unavailable
from deltadock.settings import Settings
from deltadock.storage.blobs.port import CHUNK_BYTES

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

ATTEMPTS: Final = 5
"""Of each request, by botocore: with exponential back-off and jitter, at most 20 s apart."""
READ_SECONDS: Final = 30.0
"""A server that sends nothing for this long has failed."""

MISSING: Final = frozenset({"404", "NoSuchKey", "NotFound", "NoSuchBucket", "NoSuchUpload"})
FULL: Final = frozenset({"507", "InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"})
DENIED: Final = frozenset(
    {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}
)
EXISTS: Final = frozenset({"412", "PreconditionFailed"})
CONFLICT: Final = frozenset({"409", "ConditionalRequestConflict"})


def make_client(settings: Settings, endpoint_url: str | None) -> "S3Client":
    """A client of the settings' server at this URL; None is AWS's."""
    secret = settings.s3_secret_access_key
    client = boto3.client(
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
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            connect_timeout=5,
            read_timeout=READ_SECONDS,
            max_pool_connections=50,
            s3={"addressing_style": "path" if endpoint_url else "auto"},
        ),
    )
    client.meta.events.register("before-sign.s3.DeleteObjects", _add_md5)
    return client


def _add_md5(request: AWSRequest, **_: object) -> None:
    """Add the header that S3 demanded before it knew checksums of other kinds; many servers do."""
    body: bytes = request.data  # type: ignore[assignment]  # as botocore's serialiser made it
    digest = hashlib.md5(body, usedforsecurity=False).digest()
    request.headers["Content-MD5"] = base64.b64encode(digest).decode()


def read_object(
    client: "S3Client", bucket: str, key: str, start: int, end: int, *, etag: str | None = None
) -> Iterator[bytes]:
    """Bytes `[start, end)` of an object in chunks; with `etag`, of the one that has it.

    A transfer that breaks off resumes where it was; botocore repeats only requests.

    Raises:
        NotFound: the object is gone, or another one is in its place.
        Unavailable: the server does not answer, or keeps breaking off.
    """
    breaks = 0
    get = client.get_object if etag is None else partial(client.get_object, IfMatch=etag)
    while start < end:
        try:
            with s3_errors(f"The object store no longer holds {key}."):
                span = f"bytes={start}-{end - 1}"
                body = get(Bucket=bucket, Key=key, Range=span)["Body"]
            with closing(body):
                for chunk in body.iter_chunks(CHUNK_BYTES):
                    start, breaks = start + len(chunk), 0
                    yield chunk
        except BotoCoreError as error:  # of the body; those of the request were translated
            breaks += 1
            if breaks == ATTEMPTS:
                raise Unavailable(
                    "The object store keeps breaking off a file; try again shortly."
                ) from error
            time.sleep(random.uniform(0, 2**breaks / 4))


def as_body(buffer: bytearray) -> bytes:
    """A request's body that is not copied: boto3 takes bytearrays, which its types do not say."""
    return cast("bytes", buffer)


def code_of(error: ClientError) -> str:
    """The error's code in S3's answer."""
    return error.response.get("Error", {}).get("Code", "")


@contextmanager
def s3_errors(missing: str | None = None) -> Iterator[None]:
    """Translate boto's errors; a missing object raises NotFound(`missing`), if given.

    So does one that is not the one a condition names.
    """
    try:
        yield
    except ClientError as error:
        code = code_of(error)
        if missing and code in MISSING | EXISTS:
            raise NotFound(missing) from error
        if code in FULL:
            raise StorageFull(
                "The object store is full. Free space there or raise its quota, then try again."
            ) from error
        if code in DENIED:
            raise Unavailable(
                "The object store refuses Deltadock's credentials. Check "
                "DELTADOCK_S3_ACCESS_KEY_ID, DELTADOCK_S3_SECRET_ACCESS_KEY, the bucket's policy "
                "and this machine's clock."
            ) from error
        raise Unavailable(
            f"The object store refused a request ({code}); try again shortly."
        ) from error
    except (BotoCoreError, Boto3Error) as error:
        raise Unavailable("The object store does not answer; try again shortly.") from error
