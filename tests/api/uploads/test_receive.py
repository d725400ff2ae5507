"""Receiving a file: bounded memory, backpressure, atomicity."""

import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from deltadock.api.uploads import receive
from deltadock.api.uploads.receive import BATCH_BYTES, make_inspector, receive_file
from deltadock.errors import Unavailable
from deltadock.storage.blobs.local import LocalBlobStore
from deltadock.storage.blobs.writer import Chunk
from deltadock.storage.tables import UploadKind


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Receiving 64 MiB takes memory for three batches and a few hundred KiB."""
    store = LocalBlobStore(tmp_path)
    total = 64 * BATCH_BYTES

    async def body() -> AsyncIterator[bytes]:
        for _ in range(total // 65_536):
            yield bytes(65_536)

    async def receive() -> int:
        inspector = make_inspector(UploadKind.CHECKPOINT, "tokenizer.json")
        file, _ = await receive_file(body(), inspector, store, limit=total, announced=frozenset())
        return file.size

    tracemalloc.start()
    try:
        assert anyio.run(receive) == total
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * BATCH_BYTES


def test_a_slow_store_slows_the_sender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one batch is read ahead of the store."""
    store = LocalBlobStore(tmp_path)
    writer = store.writer()
    given = written = most = 0
    write = writer.write

    def slow_write(*chunks: Chunk) -> None:
        nonlocal written
        time.sleep(0.005)
        write(*chunks)
        written += sum(map(len, chunks))

    monkeypatch.setattr(writer, "write", slow_write)
    monkeypatch.setattr(store, "writer", lambda: writer)

    async def body() -> AsyncIterator[bytes]:
        nonlocal given, most
        for _ in range(100):
            most = max(most, given - written)
            given += 65_536
            yield bytes(65_536)

    async def receive() -> None:
        inspector = make_inspector(UploadKind.CHECKPOINT, "tokenizer.json")
        await receive_file(body(), inspector, store, limit=10**9, announced=frozenset())

    anyio.run(receive)
    assert written == given == 100 * 65_536
    assert most <= BATCH_BYTES


def test_cancelling_leaves_no_staging_file(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path)

    async def body(scope: anyio.CancelScope) -> AsyncIterator[bytes]:
        yield bytes(2 * BATCH_BYTES)
        scope.cancel()
        await anyio.sleep_forever()

    async def receive() -> bool:
        inspector = make_inspector(UploadKind.CHECKPOINT, "tokenizer.json")
        with anyio.CancelScope() as scope:
            await receive_file(body(scope), inspector, store, limit=10**9, announced=frozenset())
        return scope.cancelled_caught

    assert anyio.run(receive)
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_body_that_stops_arriving_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receive, "BODY_SECONDS", 0.2)
    store = LocalBlobStore(tmp_path)

    async def body() -> AsyncIterator[bytes]:
        yield bytes(BATCH_BYTES)
        await anyio.sleep(0.1)  # slow, but not stopped
        yield bytes(BATCH_BYTES)
        await anyio.sleep_forever()

    async def receive_it() -> None:
        inspector = make_inspector(UploadKind.CHECKPOINT, "tokenizer.json")
        with anyio.fail_after(10):
            await receive_file(body(), inspector, store, limit=10**9, announced=frozenset())

    with pytest.raises(Unavailable, match="stopped arriving"):
        anyio.run(receive_it)
    assert list((tmp_path / "staging").iterdir()) == []
