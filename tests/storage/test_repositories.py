"""Checkpoints, bases, uploads and deltas, on both databases."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy.orm import Session

from deltadock.errors import Conflict
from deltadock.storage.database import Database, database_now
from deltadock.storage.models import (
    BaseRow,
    CheckpointRow,
    DeltaRow,
    JobState,
    UploadFileRow,
    UploadKind,
    UploadState,
)
from deltadock.storage.repositories import (
    BaseRepository,
    CheckpointRepository,
    DeltaRepository,
    JobRepository,
    UploadRepository,
)
from deltadock.storage.tenancy import LOCAL_TENANT


def add_checkpoint(session: Session, character: str) -> CheckpointRow:
    return CheckpointRepository(session, LOCAL_TENANT).add(
        CheckpointRow(
            digest=character * 64,
            weights_digest=character * 64,
            model_type="llama",
            total_bytes=2**40,
        )
    )


def add_base(session: Session, name: str = "tiny") -> BaseRow:
    return BaseRepository(session, LOCAL_TENANT).add(name, add_checkpoint(session, "a"))[0]


def add_delta(session: Session, name: str = "p/m", fingerprint: str = "f") -> DeltaRow:
    return DeltaRepository(session, LOCAL_TENANT).add(
        name=name,
        base=add_base(session),
        checkpoint_digest=add_checkpoint(session, "b").digest,
        method="adamix",
        bits=1.0,
        options={"seed": 0},
        fingerprint=fingerprint * 64,
    )


def make_ready(session: Session, delta: DeltaRow) -> None:
    jobs, job_id = JobRepository(session, LOCAL_TENANT), delta.job.id
    assert jobs.acquire(job_id, "worker", 60)
    DeltaRepository(session, LOCAL_TENANT).set_result(
        delta, artifact_digest="c" * 64, artifact_bytes=5, report={"kl": 0.01}
    )
    assert jobs.finish(job_id, "worker", JobState.READY)


def test_the_same_checkpoint_is_one_row(database: Database) -> None:
    def add() -> str:
        with database.session_scope() as session:
            return add_checkpoint(session, "a").digest

    with ThreadPoolExecutor(4) as pool:
        assert {task.result() for task in [pool.submit(add) for _ in range(4)]} == {"a" * 64}


def test_a_base_is_found_by_id_and_name(database: Database) -> None:
    with database.session_scope() as session:
        base = add_base(session)
    with database.read_scope() as session:
        bases = BaseRepository(session, LOCAL_TENANT)
        for reference in (base.id, "tiny"):
            found = bases.find(reference)
            assert found is not None
            assert found.checkpoint.total_bytes == 2**40
        assert bases.find("other") is None
        assert [found.name for found in bases.all()] == ["tiny"]


def test_an_id_takes_precedence_over_an_equal_name(database: Database) -> None:
    with database.session_scope() as session:
        victim = add_base(session)
        BaseRepository(session, LOCAL_TENANT).add(victim.id, add_checkpoint(session, "b"))
    with database.read_scope() as session:
        found = BaseRepository(session, LOCAL_TENANT).find(victim.id)
        assert found is not None
        assert found.id == victim.id


def test_a_base_name_cannot_be_reused_for_another_checkpoint(database: Database) -> None:
    with database.session_scope() as session:
        bases = BaseRepository(session, LOCAL_TENANT)
        first, is_new = bases.add("tiny", add_checkpoint(session, "a"))
        assert is_new
        again, is_new = bases.add("tiny", add_checkpoint(session, "a"))
        assert (again.id, is_new) == (first.id, False)
        with pytest.raises(Conflict):
            bases.add("tiny", add_checkpoint(session, "b"))


def test_a_file_with_the_same_path_is_replaced(database: Database) -> None:
    with database.session_scope() as session:
        upload_id = UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT).id
    for size in (1, 2):
        with database.session_scope() as session:
            uploads = UploadRepository(session, LOCAL_TENANT)
            upload = uploads.find(upload_id, lock=True)
            assert upload is not None
            for path in ("b.json", "a.json"):
                file = UploadFileRow(path=path, size=size, sha256="a" * 64, tensors=[{"x": size}])
                uploads.put_file(upload, file)
    with database.read_scope() as session:
        upload = UploadRepository(session, LOCAL_TENANT).find(upload_id)
        assert upload is not None
        assert [(file.path, file.size) for file in upload.files] == [("a.json", 2), ("b.json", 2)]
        assert upload.files[0].tensors == [{"x": 2}]


def test_only_open_uploads_can_be_abandoned_or_aborted(database: Database) -> None:
    with database.session_scope() as session:
        uploads = UploadRepository(session, LOCAL_TENANT)
        upload = uploads.add(UploadKind.CALIBRATION)
        now = database_now(session)
        assert uploads.abandoned(now - timedelta(hours=1)) == []
        assert [found.id for found in uploads.abandoned(now + timedelta(hours=1))] == [upload.id]
        upload.calibration_digest = "d" * 64
        assert not uploads.has_calibration("d" * 64)
        uploads.complete(upload)
        assert uploads.has_calibration("d" * 64)
        assert uploads.abandoned(now + timedelta(hours=1)) == []
        uploads.abort(upload)
        assert upload.state is UploadState.COMPLETE


def test_versions_increase_and_deleted_ones_are_not_reused(database: Database) -> None:
    with database.session_scope() as session:
        deltas = DeltaRepository(session, LOCAL_TENANT)
        first, second = add_delta(session), add_delta(session)
        assert (first.version, second.version, add_delta(session, "p/other").version) == (1, 2, 1)
        deltas.delete(second)
        assert deltas.find(second.id) is None
        assert deltas.find_version("p/m", 2) is None
        assert add_delta(session).version == 3


def test_concurrently_created_versions_are_unique(database: Database) -> None:
    with database.session_scope() as session:
        add_delta(session)

    def add() -> int:
        with database.session_scope() as session:
            return add_delta(session).version

    with ThreadPoolExecutor(4) as pool:
        versions = [task.result() for task in [pool.submit(add) for _ in range(8)]]
    assert sorted(versions) == list(range(2, 10))


def test_a_name_resolves_to_its_highest_ready_version(database: Database) -> None:
    with database.session_scope() as session:
        deltas = DeltaRepository(session, LOCAL_TENANT)
        first, second, third = (add_delta(session) for _ in range(3))
        latest = deltas.find_latest("p/m")
        assert latest is not None
        assert latest.id == third.id
        make_ready(session, first)
        make_ready(session, second)
    with database.read_scope() as session:
        deltas = DeltaRepository(session, LOCAL_TENANT)
        latest = deltas.find_latest("p/m")
        assert latest is not None
        assert latest.id == second.id
        assert latest.report == {"kl": 0.01}
        assert [delta.id for delta in deltas.ready()] == [second.id, first.id]
        assert deltas.find_latest("p/none") is None


def test_an_equal_request_is_found_unless_it_failed_or_was_deleted(database: Database) -> None:
    with database.session_scope() as session:
        deltas, jobs = DeltaRepository(session, LOCAL_TENANT), JobRepository(session, LOCAL_TENANT)
        first, second = add_delta(session), add_delta(session, "p/other")
        add_delta(session, fingerprint="e")
        assert {delta.id for delta in deltas.find_same("f" * 64)} == {first.id, second.id}
        jobs.request_cancel(first.job.id)
        assert [delta.id for delta in deltas.find_same("f" * 64)] == [second.id]
        running = second.job.id
        jobs.acquire(running, "worker", 60)
        jobs.request_cancel(running)
        assert deltas.find_same("f" * 64) == []


def test_pages_contain_every_delta_once_newest_first(database: Database) -> None:
    with database.session_scope() as session:
        ids = [add_delta(session).id for _ in range(5)]
    seen: list[str] = []
    with database.session_scope() as session:
        deltas = DeltaRepository(session, LOCAL_TENANT)
        after = None
        while page := deltas.page(limit=2, after=after):
            seen += [delta.id for delta in page]
            after = deltas.cursor(page[-1].id)
            assert after is not None
            if len(seen) == 2:
                deltas.delete(after)  # the last delta of a page may be deleted before the next page
    assert seen == ids[::-1]
