"""Stores that fail: clear errors, retries, nothing half-made, every stream closed."""

import errno
import gc
import hashlib
import os
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from botocore.retries.standard import ExponentialBackoff
from structlog.testing import capture_logs

from deltadock.errors import DamagedBlob, DeltadockError, NotFound, StorageFull, Unavailable
from deltadock.settings import Settings
from deltadock.storage.blobs import BlobStore, PartedFile, make_blob_store, s3_client
from deltadock.storage.blobs.local import LocalBlobStore
from deltadock.storage.blobs.port import nobody_waits
from deltadock.storage.blobs.s3 import S3BlobStore
from deltadock.storage.blobs.s3_client import ATTEMPTS
from tests.storage.faulty_proxy import Fault, FaultyProxy, faulty_proxy

DATA = bytes(range(256)) * 16_384
PART_BYTES = 5 << 20
"""S3's minimum, which the server enforces."""
DIGEST = hashlib.sha256(DATA).hexdigest()
PARTS_DIGEST = hashlib.sha256(DATA[:250]).hexdigest()


class TestObjectStore:
    """A real S3 server behind a proxy that breaks chosen requests."""

    @pytest.fixture(autouse=True)
    def _no_waiting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.01)
        monkeypatch.setattr(s3_client.time, "sleep", lambda _: None)

    @pytest.fixture
    def proxy(self, s3_bucket: dict[str, str]) -> Iterator[FaultyProxy]:
        with faulty_proxy(s3_bucket["s3_endpoint_url"]) as proxy:
            yield proxy

    @pytest.fixture
    def store(self, proxy: FaultyProxy, s3_bucket: dict[str, str]) -> Iterator[S3BlobStore]:
        store = make_blob_store(Settings.model_validate(s3_bucket | {"s3_endpoint_url": proxy.url}))
        assert isinstance(store, S3BlobStore)
        store.buffer_bytes = PART_BYTES
        store.prepare()
        yield store
        assert leftovers(store) == []
        gc.collect()  # a stream that was not closed raises ResourceWarning here
        store.client.close()

    def test_broken_reads_resume(
        self, store: S3BlobStore, proxy: FaultyProxy, tmp_path: Path, subtests: pytest.Subtests
    ) -> None:
        store.put_bytes(DATA)
        store.put_work("job_a/block", DATA)
        for fault in (
            {"reset_answer": 3_000_000},
            {"truncate": 1_000_000},
            {"truncate": 0},
            {"status": 503, "times": ATTEMPTS - 1},
            {"status": 500, "code": "InternalError"},
        ):
            for read in (
                lambda: b"".join(store.open(DIGEST)),
                lambda: store.read(DIGEST, len(DATA)),
                lambda: store.get_work("job_a/block"),
                lambda: [store.fetch(DIGEST, tmp_path / "f"), (tmp_path / "f").read_bytes()][1],
            ):
                with subtests.test(fault=fault):
                    proxy.faults = [Fault("GET", **fault)]  # type: ignore[arg-type]
                    assert read() == DATA
                    assert proxy.faults[0].times == 0
        assert b"".join(store.open(DIGEST, 5, 9)) == DATA[5:9]

    def test_a_server_that_falls_silent_is_asked_again(
        self, proxy: FaultyProxy, s3_bucket: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3_client, "READ_SECONDS", 2.0)
        store = make_blob_store(Settings.model_validate(s3_bucket | {"s3_endpoint_url": proxy.url}))
        proxy.faults = [Fault("PUT", "blobs/", wait=2.5), Fault("GET", "blobs/", wait=2.5)]
        assert store.put_bytes(DATA) == DIGEST
        assert b"".join(store.open(DIGEST)) == DATA
        assert [fault.times for fault in proxy.faults] == [0, 0]

    def test_only_what_is_missing_is_read_again(
        self, store: S3BlobStore, proxy: FaultyProxy
    ) -> None:
        store.put_bytes(DATA)
        proxy.faults = [Fault("GET", truncate=2 << 20)]
        seen = sum(1 for _ in store.open(DIGEST))
        assert seen == len(DATA) >> 20

    def test_a_store_that_keeps_failing_is_unavailable(
        self, store: S3BlobStore, proxy: FaultyProxy, tmp_path: Path, subtests: pytest.Subtests
    ) -> None:
        store.put_bytes(DATA)
        for fault in ({"status": 503}, {"truncate": 0}, {"reset_answer": 0}):
            with subtests.test(fault=fault):
                proxy.faults = [Fault("GET", times=99, **fault)]
                with pytest.raises(Unavailable):
                    b"".join(store.open(DIGEST))
                assert 99 - proxy.faults[0].times == ATTEMPTS
                with pytest.raises(Unavailable):
                    store.fetch(DIGEST, tmp_path / "f")
                assert list(tmp_path.iterdir()) == []

    def test_a_reader_that_stops_early_closes_the_stream(self, store: S3BlobStore) -> None:
        store.put_bytes(DATA)
        stream = store.open(DIGEST)
        next(stream)
        del stream
        unread = store.open(DIGEST)
        del unread

    @pytest.mark.parametrize("size", [1000, PART_BYTES + 1000])
    def test_broken_writes_are_repeated(
        self, store: S3BlobStore, proxy: FaultyProxy, size: int, subtests: pytest.Subtests
    ) -> None:
        for number, fault in enumerate(
            (
                Fault("PUT", reset_request=500),
                Fault("PUT", status=503),
                Fault("PUT", lose_answer=True),
                Fault("POST", "uploadId", lose_answer=True, times=2),
                Fault("POST", "uploads", lose_answer=True),
            )
        ):
            with subtests.test(fault=fault):
                proxy.faults = [fault]
                data = number.to_bytes(1, "big") * size
                digest = store.put_bytes(data)
                assert hashlib.sha256(b"".join(store.open(digest))).hexdigest() == digest
        # A request to begin a multipart upload whose answer was lost is repeated: one too many
        # was begun, and the sweeper drops it.
        drop_multipart_uploads(store)

    def test_a_failed_write_leaves_nothing(
        self, store: S3BlobStore, proxy: FaultyProxy, subtests: pytest.Subtests
    ) -> None:
        data = bytes(PART_BYTES + 1000)
        for fault in (
            Fault("PUT", "partNumber=2", status=503, times=99),
            Fault("POST", "uploadId", status=503, times=ATTEMPTS),
            Fault("PUT", "blobs/", status=503, times=99),
        ):
            with subtests.test(fault=fault):
                proxy.faults = [fault]
                with pytest.raises(Unavailable):
                    store.put_bytes(data)
                assert leftovers(store) == []
                assert not store.exists(hashlib.sha256(data).hexdigest())

    def test_parts_survive_what_fails(
        self, store: S3BlobStore, proxy: FaultyProxy, subtests: pytest.Subtests
    ) -> None:
        def publish() -> None:
            file.seal()
            file.publish(DIGEST, lambda: None, nobody_waits)

        file = store.begin_parts("upl_a", len(DATA), len(DATA))
        for fault, step in (
            (Fault("PUT", "partNumber=1", status=503, times=ATTEMPTS), partial(send_part, file, 1)),
            (Fault("POST", "uploadId", status=503, times=ATTEMPTS), publish),
            (Fault("PUT", "blobs/", status=503, times=ATTEMPTS), publish),
            (Fault("POST", "blobs/", status=503, times=ATTEMPTS), publish),
        ):
            with subtests.test(fault=fault):
                proxy.faults = [fault]
                with pytest.raises(Unavailable):
                    step()
                assert fault.times == 0
                assert not store.exists(DIGEST)
                if step is not publish:
                    assert file.arrived() == frozenset()
                    proxy.faults = [Fault("PUT", "partNumber=1", lose_answer=True)]
                    step()
        publish()
        assert b"".join(store.open(DIGEST)) == DATA
        file.drop()

    @pytest.mark.parametrize(
        ("status", "code", "error", "advice"),
        [
            (507, "InsufficientStorage", StorageFull, "Free space"),
            (507, "XMinioStorageFull", StorageFull, "Free space"),
            (403, "AccessDenied", Unavailable, "S3_SECRET_ACCESS_KEY"),
            (403, "InvalidAccessKeyId", Unavailable, "S3_ACCESS_KEY_ID"),
            (503, "SlowDown", Unavailable, "SlowDown"),
        ],
    )
    def test_refusals_say_what_to_do(
        self,
        store: S3BlobStore,
        proxy: FaultyProxy,
        status: int,
        code: str,
        error: type[DeltadockError],
        advice: str,
    ) -> None:
        proxy.faults = [Fault("PUT", "blobs/", status=status, code=code, times=99)]
        with pytest.raises(error, match=advice):
            store.put_bytes(b"x")

    def test_a_server_without_conditional_writes_is_found_out_at_the_start(
        self, proxy: FaultyProxy, s3_bucket: dict[str, str]
    ) -> None:
        proxy.faults = [Fault("PUT", "staging/", status=501, code="NotImplemented")]
        store = make_blob_store(Settings.model_validate(s3_bucket | {"s3_endpoint_url": proxy.url}))
        assert isinstance(store, S3BlobStore)
        store.buffer_bytes = PART_BYTES
        with capture_logs() as logs:
            store.prepare()
        assert [entry["event"] for entry in logs] == ["s3_without_conditional_writes"]
        for size in (10, PART_BYTES + 1):
            digest = store.put_bytes(bytes(size))
            store.put_bytes(bytes(size))
            assert store.size(digest) == size
        assert leftovers(store) == []
        store.client.close()


def send_part(file: PartedFile, number: int) -> None:
    """The part with the bytes of `DATA` in two writes."""
    start, size = (number - 1) * file.part_bytes, file.part_size(number)
    with file.writer(number) as writer:
        for at in (start, start + size // 2):
            writer.write(DATA[at : start + size if at > start else start + size // 2])
        writer.commit()


def leftovers(store: S3BlobStore) -> list[str]:
    """Staged objects and unfinished multipart uploads."""
    objects = store.client.list_objects_v2(Bucket=store.bucket, Prefix="staging/")
    uploads = store.client.list_multipart_uploads(Bucket=store.bucket)
    return [
        *(entry["Key"] for entry in objects.get("Contents", [])),
        *(entry["Key"] for entry in uploads.get("Uploads", [])),
    ]


def drop_multipart_uploads(store: S3BlobStore) -> None:
    for upload in store.client.list_multipart_uploads(Bucket=store.bucket).get("Uploads", []):
        store.client.abort_multipart_upload(
            Bucket=store.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
        )


class TestFolder:
    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalBlobStore:
        store = LocalBlobStore(tmp_path / "store")
        store.prepare()
        return store

    def files(self, store: LocalBlobStore) -> list[str]:
        return [path.name for path in store.root.rglob("*") if path.is_file()]

    def test_a_file_over_the_disks_limit_leaves_nothing(self, store: LocalBlobStore) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        try:
            for write in (store.put_bytes, lambda data: store.put_work("job_a/block", data)):
                with pytest.raises(StorageFull, match="Free space"):
                    write(DATA)
                assert self.files(store) == []
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    @pytest.mark.parametrize("call", ["open", "fsync", "link", "mkdir"])
    @pytest.mark.parametrize(
        ("number", "error", "advice"),
        [
            (errno.ENOSPC, StorageFull, "Free space"),
            (errno.EDQUOT, StorageFull, "quota"),
            (errno.EROFS, Unavailable, "read-only"),
            (errno.EACCES, Unavailable, "permissions"),
            (errno.EIO, Unavailable, "check its disk"),
        ],
    )
    def test_a_failing_disk_leaves_nothing(
        self,
        store: LocalBlobStore,
        monkeypatch: pytest.MonkeyPatch,
        call: str,
        number: int,
        error: type[DeltadockError],
        advice: str,
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError(number, os.strerror(number))

        owner = Path if call in {"open", "mkdir"} else os
        with monkeypatch.context() as patch:
            patch.setattr(owner, call, fail)
            with pytest.raises(error, match=advice):
                store.put_bytes(DATA)
            if call != "link":
                with pytest.raises(error, match=advice):
                    store.put_work("job_a/block", DATA)
        assert self.files(store) == []
        assert store.put_bytes(DATA) == DIGEST

    def test_a_full_cache_leaves_nothing(
        self, store: LocalBlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.put_bytes(DATA)

        def fail(*_: object) -> None:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(LocalBlobStore, "_place", fail)
        with pytest.raises(StorageFull, match="cache's folder is full"):
            store.fetch(DIGEST, tmp_path / "cache" / "f")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_a_folder_without_hard_links_is_renamed_into(
        self, store: LocalBlobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.EPERM, "no hard links")

        monkeypatch.setattr(os, "link", fail)
        for _ in range(2):
            assert store.put_bytes(DATA) == DIGEST
        assert self.files(store) == [DIGEST]

    def test_a_blob_that_ends_early_is_damaged(self, store: LocalBlobStore) -> None:
        store.put_bytes(DATA)
        stream = store.open(DIGEST)
        next(stream)
        part = store.open(DIGEST, 1 << 19, 1 << 21)
        store.path(DIGEST).chmod(0o644)
        with store.path(DIGEST).open("r+b") as file:
            file.truncate(1 << 20)
        for broken in (stream, part):
            with pytest.raises(DamagedBlob, match="ends early"):
                list(broken)

    @pytest.mark.parametrize(
        ("call", "number", "error"),
        [
            ("pwritev", errno.ENOSPC, StorageFull),
            ("fdatasync", errno.EIO, Unavailable),
            ("utime", errno.EROFS, Unavailable),
        ],
    )
    def test_a_part_that_meets_a_failing_disk_is_missing(
        self,
        store: LocalBlobStore,
        monkeypatch: pytest.MonkeyPatch,
        call: str,
        number: int,
        error: type[DeltadockError],
    ) -> None:
        file = store.begin_parts("upl_a", 250, 100)
        for part in (1, 2):
            send_part(file, part)
        real = getattr(os, call)

        def fail(*arguments: Any) -> int:
            if call == "pwritev" and arguments[2] % 100 == 0:  # the first half of the part fits
                return int(real(*arguments))
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            for part in (1, 3):  # one that was here, and a new one
                with pytest.raises(error):
                    send_part(file, part)
        assert file.arrived() == {2}
        for part in (1, 3):
            send_part(file, part)
        file.seal()
        file.publish(PARTS_DIGEST, lambda: None, nobody_waits)
        assert store.read(PARTS_DIGEST, 250) == DATA[:250]
        file.drop()
        assert self.files(store) == [PARTS_DIGEST]

    def test_a_blob_deleted_meanwhile_is_not_found(self, store: LocalBlobStore) -> None:
        store.put_bytes(DATA)
        stream = store.open(DIGEST)
        store.delete(DIGEST)
        with pytest.raises(NotFound):
            next(stream)


@pytest.mark.parametrize(("kind", "size"), [("local", 1), ("s3", 1), ("s3", PART_BYTES + 1)])
def test_of_two_writers_of_one_blob_one_wins(
    kind: str, size: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    fields = {} if kind == "local" else request.getfixturevalue("s3_bucket")
    store: BlobStore = make_blob_store(Settings.model_validate({"home": tmp_path, **fields}))
    if isinstance(store, S3BlobStore):
        store.buffer_bytes = PART_BYTES
    store.prepare()
    data = bytes(size)
    digest = hashlib.sha256(data).hexdigest()
    writers = [store.writer() for _ in range(4)]
    for writer in writers:
        writer.write(data)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda writer: writer.commit(digest), writers))
    assert store.is_intact(digest)
    first = list(store.entries("blobs"))
    time.sleep(1.1)  # S3 dates objects by the second
    with store.writer() as late:
        late.write(data)
        late.commit(digest)
    assert list(store.entries("blobs")) == first
    for writer in writers:
        writer.discard()
