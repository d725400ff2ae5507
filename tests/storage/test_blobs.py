"""The contract of blob stores, local and S3."""

import base64
import hashlib
import time
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import httpx
import pytest
from botocore.awsrequest import AWSPreparedRequest

from deltadock.errors import DamagedBlob, InvalidInput, NotFound, Unavailable
from deltadock.settings import Settings
from deltadock.storage.blobs import BlobStore, make_blob_store, s3
from deltadock.storage.blobs.local import LocalBlobStore
from deltadock.storage.blobs.parts import MIN_PART_BYTES
from deltadock.storage.blobs.port import CHUNK_BYTES, sha256_of
from deltadock.storage.blobs.s3 import PRESIGNED_SECONDS, S3BlobStore

ABSENT = "0" * 64


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    fields = {"blob_store": "local"}
    if request.param == "s3":
        fields = request.getfixturevalue("s3_bucket")
    store = make_blob_store(Settings.model_validate({"home": tmp_path / "home", **fields}))
    store.prepare()
    return store


def staged(store: BlobStore) -> list[str]:
    """Staging entries, including unfinished multipart uploads."""
    if isinstance(store, LocalBlobStore):
        return [path.name for path in (store.root / "staging").iterdir()]
    client, bucket = cast(S3BlobStore, store).client, cast(S3BlobStore, store).bucket
    objects = client.list_objects_v2(Bucket=bucket, Prefix="staging/").get("Contents", [])
    uploads = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    return [entry["Key"] for entry in [*objects, *uploads]]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def large_blob(store: BlobStore) -> bytes:
    """Data of several S3 parts."""
    size = MIN_PART_BYTES * 2 + 12_345 if isinstance(store, S3BlobStore) else 3_000_000
    return (b"0123456789abcdef" * (size // 16 + 1))[:size]


def test_a_stored_blob_is_read_back(store: BlobStore, tmp_path: Path) -> None:
    data = b"weights" * 1000
    digest = store.put_bytes(data)
    assert digest == sha256(data)
    assert store.exists(digest)
    assert store.size(digest) == len(data)
    assert b"".join(store.open(digest)) == data
    assert store.read(digest, len(data)) == data
    file = tmp_path / "file"
    file.write_bytes(data)
    assert store.put_file(file) == digest
    assert staged(store) == []


def test_an_empty_blob_is_stored(store: BlobStore) -> None:
    digest = store.put_bytes(b"")
    assert store.size(digest) == 0
    assert b"".join(store.open(digest)) == b""


@pytest.mark.parametrize(("start", "end"), [(0, 1), (3, 7), (6, 10), (9, 10), (0, 10), (4, None)])
def test_open_reads_a_byte_range(store: BlobStore, start: int, end: int | None) -> None:
    digest = store.put_bytes(b"0123456789")
    assert b"".join(store.open(digest, start, end)) == b"0123456789"[start:end]


def test_absent_blobs_are_not_found(store: BlobStore, tmp_path: Path) -> None:
    assert not store.exists(ABSENT)
    for use in (store.size, store.open, lambda digest: store.fetch(digest, tmp_path / "file")):
        with pytest.raises(NotFound):
            use(ABSENT)
    assert list(tmp_path.glob("*file*")) == []
    store.delete(ABSENT)


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 64, "0" * 63, f"{ABSENT}\n"])
def test_an_invalid_digest_is_not_found(store: BlobStore, name: str) -> None:
    with pytest.raises(NotFound):
        store.size(name)


def test_read_rejects_a_blob_over_its_limit(store: BlobStore) -> None:
    digest = store.put_bytes(b"12345")
    with pytest.raises(InvalidInput):
        store.read(digest, 4)


def test_a_large_blob_is_streamed_in_bounded_memory(store: BlobStore) -> None:
    data = large_blob(store)
    view = memoryview(data)
    tracemalloc.start()
    try:
        with store.writer() as writer:
            for start in range(0, len(data), 100_000):
                writer.write(view[start : start + 100_000])
            writer.commit(sha256(data))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert store.size(sha256(data)) == len(data)
    digest = hashlib.sha256()
    for chunk in store.open(sha256(data)):
        assert len(chunk) <= 1 << 20
        digest.update(chunk)
    assert digest.hexdigest() == sha256(data)
    assert staged(store) == []
    # The S3 store buffers a part, and a copy while it is sent.
    assert peak < (3.5 * MIN_PART_BYTES if isinstance(store, S3BlobStore) else 1_000_000)


def test_uncommitted_writes_leave_nothing(store: BlobStore) -> None:
    data = large_blob(store)
    with store.writer() as writer:
        writer.write(data)
        assert len(staged(store)) == 1
    assert staged(store) == []
    assert not store.exists(sha256(data))


def test_committing_an_existing_blob_changes_nothing(store: BlobStore) -> None:
    data = large_blob(store)
    for _ in range(2):
        with store.writer() as writer:
            writer.write(data)
            writer.commit(sha256(data))
    assert store.size(sha256(data)) == len(data)
    assert staged(store) == []


def test_deleted_blobs_do_not_exist(store: BlobStore) -> None:
    digest = store.put_bytes(b"x")
    store.delete(digest)
    assert not store.exists(digest)


def test_many_blobs_are_deleted_at_once(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "DELETED_AT_ONCE", 2)
    kept, *others = (store.put_bytes(bytes([number])) for number in range(6))
    requests: list[str] = []
    if isinstance(store, S3BlobStore):

        def note(request: AWSPreparedRequest, **_: object) -> None:
            requests.append(request.url.partition("?")[2])
            digest = hashlib.md5(request.body, usedforsecurity=False).digest()
            assert request.headers["Content-MD5"] == base64.b64encode(digest)

        store.client.meta.events.register("before-send.s3.DeleteObjects", note)
    store.delete(*others, ABSENT)
    assert requests in ([], ["delete"] * 3)
    assert [store.exists(digest) for digest in (kept, *others)] == [True, *[False] * 5]
    store.delete()


def test_a_refused_deletion_is_raised(
    s3_bucket: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_blob_store(Settings.model_validate({"home": tmp_path, **s3_bucket}))
    assert isinstance(store, S3BlobStore)
    refused = {"Errors": [{"Key": f"blobs/{ABSENT}", "Code": "AccessDenied", "Message": "No."}]}
    monkeypatch.setattr(store.client, "delete_objects", lambda **_: refused)
    with pytest.raises(Unavailable, match="credentials"):
        store.delete(ABSENT)


def test_fetch_writes_a_verified_read_only_file(store: BlobStore, tmp_path: Path) -> None:
    digest = store.put_bytes(b"weights")
    target = tmp_path / "cache" / "model.safetensors"
    store.fetch(digest, target)
    assert target.read_bytes() == b"weights"
    assert target.stat().st_mode & 0o222 == 0
    store.fetch(digest, target)
    target.unlink()
    assert b"".join(store.open(digest)) == b"weights"


def damage(store: BlobStore, digest: str, content: bytes) -> None:
    """Change a stored blob's bytes, as a failing disk does."""
    if isinstance(store, LocalBlobStore):
        store.path(digest).chmod(0o644)
        store.path(digest).write_bytes(content)
        store.path(digest).chmod(0o444)
    else:
        s3 = cast(S3BlobStore, store)
        s3.client.put_object(Bucket=s3.bucket, Key=f"blobs/{digest}", Body=content)


def test_damaged_blobs_are_rejected(store: BlobStore, tmp_path: Path) -> None:
    digest = store.put_bytes(b"weights")
    damage(store, digest, b"weightz")
    assert not store.is_intact(digest)
    with pytest.raises(DamagedBlob):
        store.fetch(digest, tmp_path / "cache" / "file")
    with pytest.raises(DamagedBlob):
        store.read(digest, 100)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("kept", [0.5, 1.0], ids=["truncated", "changed"])
def test_storing_a_damaged_blob_again_mends_it(
    store: BlobStore, tmp_path: Path, kept: float
) -> None:
    for data in (b"weights" * 10, large_blob(store)):
        digest = store.put_bytes(data)
        damage(store, digest, (b"?" + data[1:])[: int(kept * len(data))])
        file = tmp_path / "file"
        file.write_bytes(data)
        linked = tmp_path / digest
        if isinstance(store, LocalBlobStore):
            linked.hardlink_to(store.path(digest))
        assert store.put_file(file) == digest
        assert store.is_intact(digest)
        assert staged(store) == []
        if isinstance(store, LocalBlobStore):
            assert sha256_of(linked) != digest, "files that others have are not written to"
            assert store.path(digest).stat().st_mode & 0o222 == 0


def test_who_stores_a_blob_again_hears_that_it_is_being_read(store: BlobStore) -> None:
    data = large_blob(store)
    beats = []
    for _ in range(2):
        with store.writer() as writer:
            writer.write(data)
            writer.commit(sha256(data), lambda: beats.append(1))
    assert len(beats) >= len(data) / CHUNK_BYTES


def test_work_files_are_replaced_and_dropped(store: BlobStore) -> None:
    assert store.get_work("job_a/block-0") is None
    store.put_work("job_a/block-0", b"first")
    store.put_work("job_a/block-0", b"second")
    store.put_work("job_ab/block-0", b"another's")
    assert store.get_work("job_a/block-0") == b"second"
    store.drop_work("job_a")
    store.drop_work("job_a")
    assert store.get_work("job_a/block-0") is None
    assert store.get_work("job_ab/block-0") == b"another's"


def test_everything_stored_is_listed_by_area(store: BlobStore) -> None:
    before = datetime.now(UTC) - timedelta(minutes=1)
    digest = store.put_bytes(b"weights")
    store.put_work("job_a/print/block-0", b"saved")
    found = {area: list(store.entries(area)) for area in ("blobs", "staging", "work")}
    assert [(entry.key, entry.bytes) for entry in found["blobs"]] == [(digest, 7)]
    assert [(entry.key, entry.bytes) for entry in found["work"]] == [("job_a/print/block-0", 5)]
    assert found["staging"] == []
    assert before < found["blobs"][0].modified < before + timedelta(minutes=5)


@pytest.mark.parametrize("key", ["", "/etc", "../a", "a//b", "a/", ".hidden", "a/.."])
def test_invalid_work_keys_are_rejected(store: BlobStore, key: str) -> None:
    with pytest.raises(ValueError, match="plain"):
        store.put_work(key, b"")


def test_only_old_staging_files_are_dropped(store: BlobStore) -> None:
    writer = store.writer()
    writer.write(large_blob(store))
    now = datetime.now(UTC)
    assert store.drop_staging(now - timedelta(hours=1)) == 0
    assert staged(store) != []
    assert store.drop_staging(now + timedelta(hours=1)) == 1
    assert staged(store) == []
    if isinstance(store, LocalBlobStore):
        writer.discard()


def test_an_unreachable_store_is_unavailable() -> None:
    store = make_blob_store(
        Settings.model_validate(
            {
                "blob_store": "s3",
                "s3_endpoint_url": "http://127.0.0.1:1",
                "s3_access_key_id": "x",
                "s3_secret_access_key": "y",
            }
        )
    )
    with pytest.raises(Unavailable):
        store.exists(ABSENT)


def test_preparing_creates_the_bucket(s3_settings: dict[str, str], tmp_path: Path) -> None:
    bucket = f"new-{tmp_path.name.replace('_', '-').lower()}"
    store = make_blob_store(Settings.model_validate(s3_settings | {"s3_bucket": bucket}))
    store.prepare()
    store.prepare()
    assert store.exists(store.put_bytes(b"x"))


def presign(store: BlobStore, digest: str = ABSENT) -> str | None:
    return store.presigned_url(
        digest, disposition='attachment; filename="x.delta"', media_type="application/octet-stream"
    )


def test_a_store_that_clients_cannot_reach_signs_no_url(store: BlobStore) -> None:
    assert presign(store) is None


def test_urls_are_signed_for_the_public_host() -> None:
    fields = {
        "blob_store": "s3",
        "s3_public_url": "https://s3.eu-west-1.amazonaws.com",
        "s3_region": "eu-west-1",
        "s3_access_key_id": "key",
        "s3_secret_access_key": "secret",
    }
    url = httpx.URL(presign(make_blob_store(Settings.model_validate(fields))) or "")
    assert url.scheme == "https"
    assert url.host.endswith("s3.eu-west-1.amazonaws.com")
    assert url.params["X-Amz-Algorithm"] == "AWS4-HMAC-SHA256"
    assert url.params["X-Amz-Expires"] == str(PRESIGNED_SECONDS)


def test_a_presigned_url_serves_one_blob_until_it_expires(
    s3_bucket: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another name of the same server: the URL is signed for the host that clients use.
    public = s3_bucket["s3_endpoint_url"].replace("127.0.0.1", "localhost")
    store = make_blob_store(Settings.model_validate(s3_bucket | {"s3_public_url": public}))
    digest, other = store.put_bytes(b"0123456789"), store.put_bytes(b"other")
    url = presign(store, digest)
    assert url is not None
    assert url.startswith(f"{public}/")
    answer = httpx.get(url)
    assert (answer.status_code, answer.content) == (200, b"0123456789")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == 'attachment; filename="x.delta"'
    part = httpx.get(url, headers={"Range": "bytes=3-6"})
    assert (part.status_code, part.content) == (206, b"3456")
    assert httpx.get(url.replace(digest, other)).status_code == 403
    monkeypatch.setattr(s3, "PRESIGNED_SECONDS", 1)
    expiring = presign(store, digest)
    assert expiring is not None
    time.sleep(2.1)
    assert httpx.get(expiring).status_code == 403
