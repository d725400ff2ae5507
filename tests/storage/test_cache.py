"""Cached files are verified against their digests before use."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from deltadock.artifacts.checkpoint import CheckpointManifest
from deltadock.artifacts.folder import scan_folder
from deltadock.errors import (
    DamagedBlob,
    InvalidCheckpoint,
    NotFound,
    StorageFull,
    Unavailable,
    UnsafeFile,
)
from deltadock.storage import cache as cache_module
from deltadock.storage.blobs.local import LocalBlobStore
from deltadock.storage.blobs.port import sha256_of
from deltadock.storage.cache import FileCache


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobStore:
    return LocalBlobStore(tmp_path / "blobs")


@pytest.fixture
def cache(tmp_path: Path, blobs: LocalBlobStore) -> FileCache:
    return FileCache(blobs, tmp_path / "cache")


def put_checkpoint(blobs: LocalBlobStore, folder: Path, value: int = 0) -> CheckpointManifest:
    folder.mkdir()
    save_file({"weight": np.arange(6, dtype=np.float32) + value}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    manifest = scan_folder(folder)
    for file in manifest.files:
        blobs.put_file(folder / file.path)
    assert blobs.put_bytes(manifest.to_json()) == manifest.digest
    return manifest


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.unlink()  # it may be a hard link to its blob
    path.write_bytes(raw)


def test_what_the_store_has_damaged_is_told(tmp_path: Path, blobs: LocalBlobStore) -> None:
    manifest = put_checkpoint(blobs, tmp_path / "source")
    (weights,) = (file.sha256 for file in manifest.files if file.path == "model.safetensors")
    told: list[str] = []
    cache = FileCache(blobs, tmp_path / "cache", told.append)
    for digest in (weights, manifest.digest):
        damage(blobs.path(digest))
        with pytest.raises(DamagedBlob):
            cache.checkpoint(manifest.digest)
    assert told == [weights, manifest.digest]


def test_a_checkpoint_is_fetched_completely(
    tmp_path: Path, blobs: LocalBlobStore, cache: FileCache
) -> None:
    manifest = put_checkpoint(blobs, tmp_path / "source")
    folder, found = cache.checkpoint(manifest.digest)
    assert found == manifest
    for file in manifest.files:
        assert (folder / file.path).read_bytes() == (tmp_path / "source" / file.path).read_bytes()


def test_a_damaged_cached_file_is_fetched_again(cache: FileCache, blobs: LocalBlobStore) -> None:
    digest = blobs.put_bytes(b"delta")
    damage(cache.artifact(digest))
    assert cache.artifact(digest).read_bytes() == b"delta"


def test_a_damaged_blob_is_rejected(cache: FileCache, blobs: LocalBlobStore) -> None:
    digest = blobs.put_bytes(b"delta")
    damage(blobs.path(digest))
    with pytest.raises(DamagedBlob):
        cache.artifact(digest)
    manifest = blobs.put_bytes(b'{"files": [], "tensors": [], "config": {}}')
    damage(blobs.path(manifest))
    with pytest.raises(DamagedBlob):
        cache.checkpoint(manifest)


def test_an_unknown_checkpoint_is_not_found(cache: FileCache) -> None:
    for digest in ("0" * 64, "../../etc/passwd"):
        with pytest.raises(NotFound):
            cache.artifact(digest)
        with pytest.raises(NotFound):
            cache.checkpoint(digest)


def test_a_blob_that_is_not_a_manifest_is_rejected(cache: FileCache, blobs: LocalBlobStore) -> None:
    for content in (b"\xff", b"[]", b"{}", b'{"files": [1], "tensors": [], "config": {}}'):
        with pytest.raises(InvalidCheckpoint):
            cache.checkpoint(blobs.put_bytes(content))


def test_a_manifest_with_an_escaping_path_is_rejected(
    cache: FileCache, blobs: LocalBlobStore
) -> None:
    files = [{"path": "../escaped.json", "size": 2, "sha256": blobs.put_bytes(b"{}")}]
    crafted = json.dumps({"files": files, "tensors": [], "config": {}}).encode()
    with pytest.raises(UnsafeFile):
        cache.checkpoint(blobs.put_bytes(crafted))


def test_the_least_recently_used_checkpoints_make_room_unless_they_are_in_use(
    tmp_path: Path, blobs: LocalBlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, other = (FileCache(blobs, tmp_path / "cache") for _ in range(2))
    old, used, new = (
        put_checkpoint(blobs, tmp_path / name, value=n) for n, name in enumerate("abc")
    )
    monkeypatch.setattr("os.link", _refuse_links)
    folders = tmp_path / "cache" / "checkpoints"
    with cache.held_checkpoint(old.digest, 10**9):
        pass
    with other.held_checkpoint(used.digest, 10**9) as (folder, _):
        os.utime(folders / f"{used.digest}.lock", (0, 0))
        with cache.held_checkpoint(new.digest, 1):
            assert {path.name for path in folders.iterdir() if path.is_dir()} == {
                used.digest, new.digest,
            }  # fmt: skip
        assert (folder / "config.json").is_file()
    with cache.held_checkpoint(old.digest, 10**9) as (folder, _):
        assert (folder / "config.json").is_file(), "it is fetched again"


def test_checkpoints_that_fit_together_stay(
    tmp_path: Path, blobs: LocalBlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FileCache(blobs, tmp_path / "cache")
    both = [put_checkpoint(blobs, tmp_path / name, value=n) for n, name in enumerate("ab")]
    monkeypatch.setattr("os.link", _refuse_links)
    limit = sum(manifest.total_bytes for manifest in both)
    for manifest in (*both, both[0]):
        with cache.held_checkpoint(manifest.digest, limit):
            pass
    folders = tmp_path / "cache" / "checkpoints"
    assert sum(path.is_dir() for path in folders.iterdir()) == 2


def test_a_checkpoint_that_another_process_is_fetching_takes_its_room_already(
    tmp_path: Path, blobs: LocalBlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that are fetched at once fit only without the old one, though neither is there yet."""
    cache, other = (FileCache(blobs, tmp_path / "cache") for _ in range(2))
    old, new, also_new = (
        put_checkpoint(blobs, tmp_path / name, value=n) for n, name in enumerate("abc")
    )
    monkeypatch.setattr("os.link", _refuse_links)
    limit = new.total_bytes + also_new.total_bytes
    folders = tmp_path / "cache" / "checkpoints"
    with cache.held_checkpoint(old.digest, limit):
        pass
    fetch = blobs.fetch

    def while_the_other_fetches(digest: str, path: Path) -> None:
        monkeypatch.setattr(blobs, "fetch", fetch)
        with other.held_checkpoint(also_new.digest, limit):
            pass
        fetch(digest, path)

    monkeypatch.setattr(blobs, "fetch", while_the_other_fetches)
    with cache.held_checkpoint(new.digest, limit):
        assert {path.name for path in folders.iterdir() if path.is_dir()} == {
            new.digest, also_new.digest,
        }  # fmt: skip


def test_a_fetch_that_fails_leaves_the_room_to_another_of_the_same_checkpoint(
    tmp_path: Path, blobs: LocalBlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, other = (FileCache(blobs, tmp_path / "cache") for _ in range(2))
    manifest = put_checkpoint(blobs, tmp_path / "source")
    lock = tmp_path / "cache" / "checkpoints" / f"{manifest.digest}.lock"
    fetch = blobs.fetch

    def fail(_digest: str, _path: Path) -> None:
        raise Unavailable("The store does not answer.")

    def while_another_fails(digest: str, path: Path) -> None:
        monkeypatch.setattr(blobs, "fetch", fail)
        with pytest.raises(Unavailable), other.held_checkpoint(manifest.digest, 10**9):
            pass
        assert lock.read_text() == str(manifest.total_bytes)
        monkeypatch.setattr(blobs, "fetch", fetch)
        fetch(digest, path)

    monkeypatch.setattr(blobs, "fetch", while_another_fails)
    with cache.held_checkpoint(manifest.digest, 10**9) as (folder, _):
        assert lock.read_text() == "", "all of it is there"
    (folder / "config.json").unlink()
    monkeypatch.setattr(blobs, "fetch", fail)
    with pytest.raises(Unavailable), cache.held_checkpoint(manifest.digest, 10**9):
        pass
    assert lock.read_text() == "", "nobody fetches it"


def test_what_a_killed_process_was_fetching_makes_room(
    tmp_path: Path, blobs: LocalBlobStore, cache: FileCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, old, new = (
        put_checkpoint(blobs, tmp_path / name, value=n) for n, name in enumerate("abc")
    )
    monkeypatch.setattr("os.link", _refuse_links)
    folders = tmp_path / "cache" / "checkpoints"
    (folders / begun.digest).mkdir(parents=True)
    lock = folders / f"{begun.digest}.lock"
    lock.write_text(str(begun.total_bytes))
    os.utime(lock, (0, 0))
    for manifest in (old, new):
        with cache.held_checkpoint(manifest.digest, old.total_bytes + new.total_bytes):
            pass
    assert {path.name for path in folders.iterdir() if path.is_dir()} == {old.digest, new.digest}
    assert lock.read_text() == ""


def test_a_full_disk_is_said_and_what_is_there_is_used(
    tmp_path: Path, blobs: LocalBlobStore, cache: FileCache
) -> None:
    here, absent = (put_checkpoint(blobs, tmp_path / name, value=n) for n, name in enumerate("ab"))
    with cache.held_checkpoint(here.digest, 10**9):
        pass
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with cache.held_checkpoint(here.digest, 10**9) as (folder, _):
            assert (folder / "config.json").is_file()
        with (
            pytest.raises(StorageFull, match="cache's folder is full"),
            cache.held_checkpoint(absent.digest, 10**9),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_retry_verifies_only_what_a_broken_off_fetch_has_not(
    tmp_path: Path, blobs: LocalBlobStore, cache: FileCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = put_checkpoint(blobs, tmp_path / "source")
    first, last = manifest.files
    fetch, fetched, hashed = blobs.fetch, list[str](), list[str]()

    def until_it_breaks(digest: str, path: Path) -> None:
        if digest == last.sha256 and not fetched:
            fetched.append(digest)
            raise Unavailable("The store does not answer.")
        fetch(digest, path)

    def watched(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(blobs, "fetch", until_it_breaks)
    monkeypatch.setattr(cache_module, "sha256_of", watched)
    with pytest.raises(Unavailable):
        cache.checkpoint(manifest.digest)
    folder, _ = cache.checkpoint(manifest.digest)
    assert hashed == [], "the first file was verified as it arrived"
    cache.checkpoint(manifest.digest)
    assert hashed == [first.path, last.path], "a complete one is verified before each use"
    hashed.clear()
    (folder / last.path).unlink()
    fetched.clear()
    with pytest.raises(Unavailable):
        cache.checkpoint(manifest.digest)
    damage(folder / first.path)
    folder, _ = cache.checkpoint(manifest.digest)
    assert (folder / first.path).read_bytes() == (tmp_path / "source" / first.path).read_bytes()


def _refuse_links(*_: object) -> None:
    raise PermissionError("no hard links here")
