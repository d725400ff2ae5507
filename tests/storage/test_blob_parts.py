"""The contract of files that arrive in parts, in a folder and on a real S3 server."""

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from deltadock.errors import Conflict, HashMismatch, InvalidInput, NotFound, StorageFull
from deltadock.settings import Settings
from deltadock.storage.blobs import BlobStore, PartedFile, local_parts, make_blob_store
from deltadock.storage.blobs.local import LocalBlobStore
from deltadock.storage.blobs.local_parts import LocalPartedFile
from deltadock.storage.blobs.parts import MAX_PARTS, MIN_PART_BYTES, part_bytes_for
from deltadock.storage.blobs.port import nobody_waits
from deltadock.storage.blobs.s3 import S3BlobStore

PART = 5 << 20
"""S3's minimum, which the server enforces."""
DATA = os.urandom(2 * PART + 1234)
DIGEST = hashlib.sha256(DATA).hexdigest()
UPLOAD = "upl_a"


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    fields: dict[str, str] = {}
    if request.param == "s3":
        fields = request.getfixturevalue("s3_bucket")
        public = fields["s3_endpoint_url"].replace("127.0.0.1", "localhost")
        fields = fields | {"s3_public_url": public}
    store = make_blob_store(Settings.model_validate({"home": tmp_path / "home", **fields}))
    store.prepare()
    return store


@pytest.fixture
def file(store: BlobStore) -> PartedFile:
    return store.begin_parts(UPLOAD, len(DATA), PART)


def send(file: PartedFile, number: int, data: bytes = DATA) -> None:
    start = (number - 1) * PART
    with file.writer(number) as writer:
        for at in range(start, min(start + PART, len(data)), 1 << 20):
            writer.write(data[at : min(at + (1 << 20), start + PART)])
        writer.commit()


def hashes_to(digest: str, file: PartedFile) -> Callable[[], None]:
    def verify() -> None:
        actual = hashlib.sha256(b"".join(file.read(0, file.size))).hexdigest()
        if actual != digest:
            raise HashMismatch(actual)

    return verify


def test_parts_in_parallel_and_any_order_become_a_blob(store: BlobStore, file: PartedFile) -> None:
    assert file.arrived() == frozenset()
    send(file, 3)
    assert file.arrived() == {3}
    with pytest.raises(Conflict, match="2 of 3 parts are missing, such as number 1"):
        file.seal()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: send(file, number), [2, 1, 2, 1]))
    resumed = store.parted(UPLOAD, file.token, len(DATA), PART)  # as another process does
    assert resumed.arrived() == {1, 2, 3}
    assert not store.exists(DIGEST)
    for _ in range(2):
        resumed.seal()
        resumed.publish(DIGEST, hashes_to(DIGEST, resumed), nobody_waits)
        assert b"".join(store.open(DIGEST)) == DATA
    assert store.parted_uploads() == {UPLOAD}
    resumed.drop()
    resumed.drop()
    assert b"".join(store.open(DIGEST)) == DATA
    for use in (file.arrived, file.seal, lambda: send(file, 1)):
        with pytest.raises(NotFound):
            use()


def test_a_part_that_is_sent_again_replaces_the_first(store: BlobStore, file: PartedFile) -> None:
    send(file, 1, bytes(len(DATA)))
    time.sleep(1.1)  # the S3 server here keeps both and dates them by the second
    for number in (1, 2, 3):
        send(file, number)
    file.seal()
    file.publish(DIGEST, hashes_to(DIGEST, file), nobody_waits)
    assert b"".join(store.open(DIGEST)) == DATA


def test_incomplete_parts_do_not_count(file: PartedFile) -> None:
    with file.writer(1) as writer:
        writer.write(bytes(100))
    with file.writer(3) as writer:
        writer.write(bytes(100))
        with pytest.raises(Conflict, match="lacks 1134 bytes"):
            writer.commit()
    with file.writer(3) as writer, pytest.raises(Conflict, match="too long"):
        writer.write(bytes(1235))
    for number in (0, 4):
        with pytest.raises(InvalidInput, match="parts 1 to 3"):
            file.writer(number)
    assert file.arrived() == frozenset()


def test_bytes_that_fail_their_check_become_no_blob(store: BlobStore, file: PartedFile) -> None:
    for number in (1, 2, 3):
        send(file, number, bytes(len(DATA)))
    file.seal()
    with pytest.raises(HashMismatch):
        file.publish(DIGEST, hashes_to(DIGEST, file), nobody_waits)
    assert not store.exists(DIGEST)
    file.drop()


def test_parts_replace_a_damaged_blob(store: BlobStore, file: PartedFile) -> None:
    store.put_bytes(DATA)
    if isinstance(store, LocalBlobStore):
        store.path(DIGEST).chmod(0o644)
        store.path(DIGEST).write_bytes(b"?")
    else:
        s3 = cast(S3BlobStore, store)
        s3.client.put_object(Bucket=s3.bucket, Key=f"blobs/{DIGEST}", Body=b"?")
    for number in (1, 2, 3):
        send(file, number)
    file.seal()
    file.publish(DIGEST, hashes_to(DIGEST, file), nobody_waits)
    file.drop()
    assert store.is_intact(DIGEST)


def test_a_sealed_file_takes_no_part_begun_before(store: BlobStore, file: PartedFile) -> None:
    """Nothing may change between the check of the bytes and the blob."""
    for number in (1, 2, 3):
        send(file, number)
    with file.writer(3) as late:
        file_is_whole = len(file.arrived()) == 3  # in a folder, the part is open again
        if not file_is_whole:
            with pytest.raises(Conflict, match="part"):
                file.seal()
            send(file, 3)
        file.seal()
        with pytest.raises((Conflict, NotFound)):  # noqa: PT012 - S3 sends it at the commit
            late.write(bytes(1234))
            late.commit()
    file.publish(DIGEST, hashes_to(DIGEST, file), nobody_waits)
    assert b"".join(store.open(DIGEST)) == DATA


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_a_full_disk_is_met_before_any_part(
    store: BlobStore, file: PartedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = store.begin_parts(UPLOAD, 1 << 62, PART)  # more than a file can have
    with pytest.raises(StorageFull):
        huge.reserve()
    file.reserve()
    monkeypatch.setattr(local_parts, "RESERVED_SHARE", 0.0)
    unsent = store.begin_parts(UPLOAD, 3 * PART, PART)
    unsent.reserve()
    assert isinstance(unsent, LocalPartedFile)
    assert unsent.data.stat().st_blocks == 0, "announced files take no more of the disk"
    file.drop()
    with pytest.raises(NotFound):
        file.reserve()


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_uploads_that_are_dropped_meanwhile_do_not_disturb_a_reservation(
    store: BlobStore, file: PartedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.begin_parts("upl_dropped", PART, PART)
    scandir, listed = os.scandir, []

    def dropping(path: Any = ".") -> Any:
        if str(path).endswith("upl_dropped") and not listed:
            listed.append(path)
            store.drop_parts("upl_dropped")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", dropping)
    file.reserve()
    assert listed


def test_chunks_are_written_whatever_the_system_takes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = [b"", b"abc", bytes(7), b"", *[b"x"] * 2000, bytearray(b"de"), memoryview(b"fgh")]
    pwritev = os.pwritev
    monkeypatch.setattr(
        os, "pwritev", lambda descriptor, left, at: pwritev(descriptor, [left[0][:2]], at)
    )
    with (tmp_path / "data").open("xb") as stream:
        written = local_parts.write_at(stream.fileno(), chunks, 5)
    assert written == sum(map(len, chunks))
    assert (tmp_path / "data").read_bytes() == bytes(5) + b"".join(chunks)


@pytest.mark.parametrize("store", ["local"], indirect=True)
def test_a_stamp_holds_while_nobody_else_has_written(store: BlobStore, file: PartedFile) -> None:
    assert file.stamp(1) is None
    for number in (1, 2, 3):
        send(file, number)
    stamps = [stamp for number in (1, 2, 3) if (stamp := file.stamp(number))]
    assert len(set(stamps)) == 3
    assert file.holds(stamps)
    send(file, 1)
    assert not file.holds(stamps[:1])
    # One of two writers of a part completes it while the other one is not done.
    broken = file.writer(2)
    broken.write(b"x")
    send(file, 2)
    broken.write(b"y")
    stamp = file.stamp(2)
    assert stamp is not None
    assert not file.holds([])  # it might be killed now
    broken.discard()
    assert file.stamp(2) is None


def test_dropping_an_uploads_parts_leaves_other_uploads(store: BlobStore, file: PartedFile) -> None:
    send(file, 1)
    other = store.begin_parts("upl_b", 100, PART)
    sealed = store.begin_parts("upl_b", 1, PART)
    with sealed.writer(1) as writer:
        writer.write(b"x")
        writer.commit()
    sealed.seal()
    assert store.parted_uploads() == {UPLOAD, "upl_b"}
    store.drop_parts("upl_b")
    store.drop_parts("upl_b")
    assert store.parted_uploads() == {UPLOAD}
    assert file.arrived() == {1}
    with pytest.raises(NotFound):
        other.seal()


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_clients_send_parts_to_s3_themselves(store: BlobStore, file: PartedFile) -> None:
    for number in (3, 1, 2, 2):
        url = file.url(number)
        assert url is not None
        assert url.startswith("http://localhost:")
        part = DATA[(number - 1) * PART : number * PART]
        assert httpx.put(url, content=part).status_code == 200
        assert httpx.put(url, content=part[:-1]).status_code == 403  # its length is signed
    file.seal()
    file.publish(DIGEST, hashes_to(DIGEST, file), nobody_waits)
    assert store.size(DIGEST) == len(DATA)


@pytest.mark.parametrize("size", [1, MIN_PART_BYTES, 160 << 30, (160 << 30) + 1, 5 << 40])
def test_the_size_of_parts(size: int) -> None:
    part = part_bytes_for(size)
    assert part % (1 << 20) == 0
    assert -(-size // part) <= MAX_PARTS
