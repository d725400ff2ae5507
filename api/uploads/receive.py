"""Streams files and parts from the socket to the blob store, in bounded memory."""

import base64
import codecs
import hashlib
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from io import StringIO
from typing import Final, Protocol

import anyio
from starlette.concurrency import run_in_threadpool

from deltadock import words
from deltadock.artifacts.checkpoint import FileEntry, FileInspector, TensorEntry, check_path
from deltadock.compression.calibration.records import RecordReader
from deltadock.compression.options import CALIBRATION_SUFFIXES, check_text_bytes
from deltadock.errors import HashMismatch, InvalidCalibration, InvalidInput, TooLarge, Unavailable
from deltadock.storage.blobs import BlobStore, PartedFile
from deltadock.storage.blobs.writer import Chunk
from deltadock.storage.tables import UploadKind

BATCH_BYTES: Final = 1 << 20
"""Small chunks from the socket are hashed and written in batches of this size."""
BATCH_CHUNKS: Final = 64
"""Or of so many, however small."""

MAX_CALIBRATION_BYTES: Final = 64 << 20
"""Workers read a text into memory; this is many times what calibration uses."""

MAX_LINE: Final = 1 << 20
"""Characters. A longer line of .jsonl, which may take many times its memory when parsed, is left to
workers, and so are those after it."""

BODY_SECONDS: Final = 120.0
"""A body of which no piece (up to a MiB) arrives for so long is given up."""

_OTHER: Final = r"[a-z][a-z0-9-]*=:[A-Za-z0-9+/]*={0,2}:"
CONTENT_DIGEST_PATTERN: Final = (
    rf"^(?:{_OTHER}, ?)*sha-256=:([A-Za-z0-9+/]{{43}}=):(?:, ?{_OTHER})*$"
)
"""RFC 9530; other digests beside it are ignored."""
HEX_DIGEST_PATTERN: Final = r"^[0-9a-fA-F]{64}$"


class Inspector(Protocol):
    """Checks a file while it streams; raises as soon as the bytes cannot be valid."""

    def update(self, chunk: Chunk, /) -> None:
        """Check the next bytes."""

    def finish(self) -> tuple[FileEntry, list[TensorEntry]]:
        """The file's entry and its tensors' (SHA-256 over the whole file)."""


def make_inspector(kind: UploadKind, path: str, threads: Executor | None = None) -> Inspector:
    """The inspector for a file of an upload; with `threads`, two cores hash a checkpoint's.

    Raises:
        UnsafeFile, InvalidCheckpoint, InvalidCalibration: the path alone is not acceptable.
    """
    if kind is UploadKind.CHECKPOINT:
        return FileInspector(path, threads=threads)
    return CalibrationInspector(path)


class CalibrationInspector:
    """Hashes a text and checks its encoding (UTF-8), its size and the lines of a .jsonl."""

    def __init__(self, path: str) -> None:
        stem, dot, suffix = path.rpartition(".")
        if f"{dot}{suffix}" not in CALIBRATION_SUFFIXES:
            raise InvalidCalibration("A calibration text is one .txt or .jsonl file.")
        check_path(f"{stem}.txt")
        self._path = path
        self._size = 0
        self._hash = hashlib.sha256()
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._records = RecordReader() if suffix == "jsonl" else None
        self._line = StringIO()
        """What has arrived of the last line."""

    def update(self, chunk: Chunk) -> None:
        """Check the next bytes."""
        if self._size + len(chunk) > MAX_CALIBRATION_BYTES:
            raise TooLarge(
                f"A calibration text may have at most {MAX_CALIBRATION_BYTES} bytes, far more than "
                "calibration reads. Upload a part of it."
            )
        self._decode(chunk)
        self._hash.update(chunk)
        self._size += len(chunk)

    def finish(self) -> tuple[FileEntry, list[TensorEntry]]:
        """The file's entry; a text has no tensors."""
        self._decode(b"", final=True)
        if not self._size:
            raise InvalidCalibration("The calibration text is empty.")
        check_text_bytes(self._path, self._size)
        if self._records is not None:
            self._records.read(self._line.getvalue())
            self._records.finish()
        return FileEntry(self._path, self._size, self._hash.hexdigest()), []

    def _decode(self, chunk: Chunk, *, final: bool = False) -> None:
        try:
            text = self._decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            raise InvalidCalibration(
                f"The calibration text is not UTF-8 near byte {self._size + error.start}."
            ) from error
        if self._records is not None:
            self._read_lines(self._records, text)

    def _read_lines(self, records: RecordReader, text: str) -> None:
        for index, part in enumerate(text.split("\n")):
            if index:
                records.read(self._line.getvalue())
                self._line = StringIO()
            self._line.write(part)
            if self._line.tell() > MAX_LINE:
                self._records = None
                return


async def receive_file(
    body: AsyncIterator[Chunk],
    inspector: Inspector,
    blobs: BlobStore,
    *,
    limit: int,
    announced: frozenset[str],
    arrived: Callable[[int], None] = lambda _: None,
) -> tuple[FileEntry, list[TensorEntry]]:
    """Store `body` as a blob if it is valid; on any error nothing is stored.

    Bytes are read only after the previous ones are written, so TCP flow control slows a sender
    that is faster than the store. `arrived` is told how many, and may refuse them.

    Raises:
        TooLarge: more than `limit` bytes.
        HashMismatch: the bytes do not match an announced digest.
        ClientDisconnect: the client disconnected.
        Unavailable: the client sends nothing any more.
        InvalidInput: raised by the inspector.
    """
    writer = await run_in_threadpool(blobs.writer)
    received = 0

    def store(batch: list[Chunk]) -> None:
        for chunk in batch:
            inspector.update(chunk)
        writer.write(*batch)

    try:
        async for batch in _batches(body):
            received += sum(map(len, batch))
            check_size(received, limit)
            arrived(received)
            await run_in_threadpool(store, batch)
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
        with anyio.CancelScope(shield=True):  # even while the server shuts down
            await run_in_threadpool(writer.discard)


async def _batches(body: AsyncIterator[Chunk]) -> AsyncIterator[list[Chunk]]:
    """The body's chunks, as many together as make `BATCH_BYTES`."""
    batch: list[Chunk] = []
    size = 0
    while True:
        with anyio.move_on_after(BODY_SECONDS) as waiting:
            chunk = await anext(body, None)
        if waiting.cancelled_caught:
            raise Unavailable(
                f"The body stopped arriving: nothing came for {BODY_SECONDS:g} s. Send it again."
            )
        if chunk is None:
            break
        batch.append(chunk)
        size += len(chunk)
        if size >= BATCH_BYTES or len(batch) == BATCH_CHUNKS:
            yield batch
            batch.clear()  # nothing of it is in memory while the next one arrives
            size = 0
    yield batch


async def receive_part(
    body: AsyncIterator[Chunk], file: PartedFile, number: int, announced: frozenset[str]
) -> int:
    """Add `body` to a file as a part; returns its size. On any error the part is missing.

    Raises:
        HashMismatch: the bytes do not match an announced digest.
        Conflict, NotFound: the part has another size, or the file takes no more parts.
        ClientDisconnect: the client disconnected.
        Unavailable: the client sends nothing any more.
    """
    writer = await run_in_threadpool(file.writer, number)
    digest = hashlib.sha256() if announced else None

    def store(batch: list[Chunk]) -> None:
        writer.write(*batch)
        if digest is not None:
            for chunk in batch:
                digest.update(chunk)

    try:
        async for batch in _batches(body):
            await run_in_threadpool(store, batch)
        if digest is not None and announced - {digest.hexdigest()}:
            raise HashMismatch(
                f"Part {number} arrived with SHA-256 {digest.hexdigest()}, but "
                f"{', '.join(announced)} was announced. Send it again.",
                expected=sorted(announced),
                actual=digest.hexdigest(),
            )
        await run_in_threadpool(writer.commit)
        return file.part_size(number)
    finally:
        with anyio.CancelScope(shield=True):
            await run_in_threadpool(writer.discard)


def check_size(size: int, limit: int) -> None:
    """Raise TooLarge over `limit`."""
    if size > limit:
        raise TooLarge(f"The file is larger than {words.size(limit)}; upload it in smaller shards.")


def announced_digests(content_digest: str | None, hex_digest: str | None) -> frozenset[str]:
    """The SHA-256 digests (hex) from `Content-Digest` (RFC 9530) and `X-Content-SHA256`.

    Raises:
        InvalidInput: a header is malformed; ignoring it would skip a check the client relies on.
    """
    digests = set()
    if hex_digest is not None:
        if not re.search(HEX_DIGEST_PATTERN, hex_digest):
            raise InvalidInput("X-Content-SHA256 must be 64 hex digits.")
        digests.add(hex_digest.lower())
    if content_digest is not None:
        found = re.search(CONTENT_DIGEST_PATTERN, content_digest)
        if found is None:
            raise InvalidInput("Content-Digest must be of the form sha-256=:BASE64: (RFC 9530).")
        digests.add(base64.b64decode(found.group(1)).hex())
    return frozenset(digests)
