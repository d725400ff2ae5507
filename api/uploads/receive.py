"""One file's way from the socket to the blob store, in bounded memory."""

import base64
import binascii
import re
from collections.abc import AsyncIterator
from typing import Final

import anyio
from starlette.concurrency import run_in_threadpool

from deltadock.api.uploads.inspectors import Inspector
from deltadock.artifacts.checkpoint import FileEntry, TensorEntry
from deltadock.errors import HashMismatch, InvalidInput, TooLarge
from deltadock.storage.blobs import BlobStore

BATCH_BYTES: Final = 1 << 20
"""Chunks from the socket are small; they are hashed and written this many bytes at a time."""

_CONTENT_DIGEST: Final = re.compile(r"(?:^|,)\s*sha-256=:([^:]*):")
_HEX_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")


async def receive_file(
    body: AsyncIterator[bytes],
    inspector: Inspector,
    blobs: BlobStore,
    *,
    limit: int,
    announced: frozenset[str],
) -> tuple[FileEntry, list[TensorEntry]]:
    """Store `body` as a blob if it passes; otherwise, whatever went wrong, nothing of it stays.

    The next bytes are asked for only when the last ones are written, so a sender faster than the
    store is held back by its own connection.

    Raises:
        TooLarge: more than `limit` bytes.
        HashMismatch: the bytes have not the digest that was announced.
        ClientDisconnect: the client went away.
        InvalidInput: what the inspector raises.
    """
    writer = await run_in_threadpool(blobs.writer)
    batch = bytearray()
    received = 0

    def take() -> None:
        inspector.update(bytes(batch))
        writer.write(batch)
        batch.clear()

    try:
        async for chunk in body:
            received += len(chunk)
            check_size(received, limit)
            batch += chunk
            if len(batch) >= BATCH_BYTES:
                await run_in_threadpool(take)
        await run_in_threadpool(take)
        file, tensors = inspector.finish()
        if announced - {file.sha256}:
            raise HashMismatch(
                f"{file.path!r} arrived with SHA-256 {file.sha256}, but {', '.join(announced)} was "
                "announced. Upload it again.",
                expected=sorted(announced),
                actual=file.sha256,
            )
        await run_in_threadpool(writer.commit, file.sha256)
        return file, tensors
    finally:
        with anyio.CancelScope(shield=True):  # also when the server is shutting down
            await run_in_threadpool(writer.discard)


def check_size(size: int, limit: int) -> None:
    """Refuse a file over the limit.

    Raises:
        TooLarge: it is.
    """
    if size > limit:
        raise TooLarge(f"The file is larger than {limit} bytes; upload it in smaller shards.")


def announced_digests(content_digest: str | None, hex_digest: str | None) -> frozenset[str]:
    """The digests (hex) that `Content-Digest` (RFC 9530) and `X-Content-SHA256` promise.

    Raises:
        InvalidInput: a header that cannot be read; ignoring it would be a false assurance.
    """
    digests = set()
    if hex_digest is not None:
        if not _HEX_DIGEST.fullmatch(hex_digest):
            raise InvalidInput("X-Content-SHA256 must be 64 hex digits.")
        digests.add(hex_digest.lower())
    if content_digest is not None:
        found = _CONTENT_DIGEST.search(content_digest)
        try:
            raw = base64.b64decode(found.group(1), validate=True) if found else b""
        except binascii.Error:
            raw = b""
        if len(raw) != 32:
            raise InvalidInput("Content-Digest must be of the form sha-256=:BASE64: (RFC 9530).")
        digests.add(raw.hex())
    return frozenset(digests)
