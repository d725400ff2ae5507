"""Artifact downloads: validators, byte ranges (RFC 9110, sections 13 and 14), redirects to S3."""

import base64
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, Final, NamedTuple

from fastapi import Request, Response
from starlette.responses import StreamingResponse

from deltadock.errors import (
    DamagedBlob,
    NotFound,
    NotReady,
    PreconditionFailed,
    RangeNotSatisfiable,
)
from deltadock.problems import problems
from deltadock.storage.blobs import BlobStore

MEDIA_TYPE: Final = "application/octet-stream"
_BINARY: Final = {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}

ARTIFACT_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "The artifact (safetensors)", "content": _BINARY},
    206: {"description": "The requested range", "content": _BINARY},
    304: {"description": "If-None-Match names this version"},
    307: {"description": "The artifact's presigned URL at the object store"},
    **problems(NotFound, NotReady, PreconditionFailed, RangeNotSatisfiable, DamagedBlob),
}

# Python refuses to parse integers of more than 4,300 digits.
_ONE_RANGE: Final = re.compile(r"bytes=\s*([0-9]{0,4000})-([0-9]{0,4000})\s*", re.IGNORECASE)


class ByteRange(NamedTuple):
    """Bytes `[start, end)`."""

    start: int
    end: int


def requested_range(headers: Mapping[str, str], size: int, etag: str) -> ByteRange | None:
    """The requested range, or None for the whole file.

    As the RFC permits, malformed ranges, units other than bytes and multiple ranges are ignored,
    as is a range whose `If-Range` names another version.

    Raises:
        RangeNotSatisfiable: the range starts at or after the end, or is the last 0 bytes.
    """
    header = headers.get("range")
    if header is None or headers.get("if-range", etag) != etag:
        return None
    match = _ONE_RANGE.fullmatch(header)
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, end = max(0, size - int(last)), size
        satisfiable = int(last) > 0 and size > 0
    else:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < int(first):
            return None
        satisfiable = start < size
    if not satisfiable:
        raise RangeNotSatisfiable(
            f"{header!r} is outside the file, which has {size} bytes.", size=size
        )
    return ByteRange(start, end)


def is_unchanged(headers: Mapping[str, str], etag: str) -> bool:
    """Whether `If-None-Match` names this version."""
    known = [tag.strip().removeprefix("W/") for tag in headers.get("if-none-match", "").split(",")]
    return etag in known or known == ["*"]


def is_refused(headers: Mapping[str, str], etag: str) -> bool:
    """Whether there is an `If-Match` and it does not name this version."""
    wanted = [tag.strip() for tag in headers.get("if-match", etag).split(",")]
    return etag not in wanted and wanted != ["*"]


def artifact_response(request: Request, blobs: BlobStore, digest: str, filename: str) -> Response:
    """Answer a GET or HEAD of the blob `digest`: its bytes, a range, 304 or a redirect.

    Raises:
        NotFound: the store does not hold the blob.
        PreconditionFailed: `If-Match` names another version.
        DamagedBlob, Unavailable: its first bytes cannot be read; later, the answer breaks off.
        RangeNotSatisfiable: the range is outside the file.
    """
    size = blobs.size(digest)
    etag = f'"{digest}"'
    disposition = f'attachment; filename="{filename}"'
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": etag,
        "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(digest)).decode()}:",
        "Content-Disposition": disposition,
        # The bytes never change, but the delta may be deleted: caches must revalidate.
        "Cache-Control": "private, no-cache",
    }
    is_other = is_refused(request.headers, etag)
    if is_unchanged(request.headers, etag) and not is_other:
        return Response(status_code=304, headers=headers)
    part = requested_range(request.headers, size, etag) if request.method == "GET" else None
    # The object store knows its own ETag, not ours: conditions on ours are evaluated here.
    ours = request.headers.get("if-range") == etag or (
        "if-match" in request.headers and not is_other
    )
    if request.method == "GET" and not ours:
        url = blobs.presigned_url(digest, disposition=disposition, media_type=MEDIA_TYPE)
        if url is not None:
            return Response(status_code=307, headers={"Location": url, "Cache-Control": "no-store"})
    if is_other:
        raise PreconditionFailed("If-Match names another version than this; download it anew.")
    start, end = part or ByteRange(0, size)
    headers["Content-Length"] = str(end - start)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    body = iter(()) if request.method == "HEAD" else _begun(blobs.open(digest, start, end))
    return StreamingResponse(body, 206 if part else 200, headers, media_type=MEDIA_TYPE)


def _begun(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The chunks; the first has been read, so that a store that fails at once is answered for."""
    return chain([next(chunks, b"")], chunks)
