"""Receiving one file: in bounded memory, as fast as the store, and all or nothing."""

import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from deltadock.api.uploads.receive import BATCH_BYTES, make_inspector, receive_file
from deltadock.storage.blobs.local import LocalBlobStore
from deltadock.storage.models import UploadKind


def test_a_file_passes_in_bounded_memory(tmp_path: Path) -> None:
    """64 MiB go through while a few hundred KiB more than two batches are held."""
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
    assert peak < 3 * BATCH_BYTES


def test_the_sender_is_held_back_by_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read ahead: at most a batch has been taken that is not written."""
    store = LocalBlobStore(tmp_path)
    writer = store.writer()
    given = written = most = 0
    write = writer.write

    def slow_write(chunk: bytes | bytearray | memoryview) -> None:
        nonlocal written
        time.sleep(0.005)
        write(chunk)
        written += len(chunk)

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


def test_a_cancelled_receiver_leaves_nothing(tmp_path: Path) -> None:
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
