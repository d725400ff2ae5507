"""Checkpoints, bases, uploads and deltas, on both databases."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from deltadock.errors import Conflict
from deltadock.storage.database import Database, database_now
from deltadock.storage.repositories import (
    BaseRepository,
    CheckpointRepository,
    DeltaRepository,
    JobRepository,
    UploadRepository,
    listing,
)
from deltadock.storage.repositories.listing import (
    DeltaFilter,
    DeltaSort,
    JobFilter,
    key_of,
    key_of_job,
)
from deltadock.storage.tables import (
    BaseRow,
    CheckpointRow,
    DeltaRow,
    JobState,
    TenantRow,
    UploadFileRow,
    UploadKind,
    UploadState,
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
        options={"seed": 0, "solver": "exact", "goal": None, "calibration": None},
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
        assert [found.name for found in bases.page(limit=9)] == ["tiny"]


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
        uploads = UploadRepository(session, LOCAL_TENANT)
        upload = uploads.find(upload_id)
        assert upload is not None
        assert [(file.path, file.size) for file in upload.files] == [("a.json", 2), ("b.json", 2)]
        assert uploads.tensors(upload) == {"a.json": [{"x": 2}], "b.json": [{"x": 2}]}


def test_the_database_copies_the_tensors_of_an_equal_file(database: Database) -> None:
    path, digest, tensors = "model.safetensors", "b" * 64, [{"name": "x", "shape": [1, 2]}]
    with database.session_scope() as session:
        file = UploadFileRow(path=path, size=1, sha256=digest, tensors=tensors)
        UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT, [file])
    with database.session_scope() as session:
        uploads = UploadRepository(session, LOCAL_TENANT)
        known = uploads.stored_files(UploadKind.CHECKPOINT, [digest])[digest]
        second = uploads.add(UploadKind.CHECKPOINT, [uploads.copy_of(known, path)])
        assert second.files[0].stored
    with database.read_scope() as session:
        assert UploadRepository(session, LOCAL_TENANT).tensors(second) == {path: tensors}


@pytest.mark.parametrize("change", ["replaced", "awaited", "removed"])
def test_a_file_that_has_changed_meanwhile_is_not_copied(database: Database, change: str) -> None:
    """Another request may change it between its choice and the row's insertion."""
    path, digest = "model.safetensors", "b" * 64
    with database.session_scope() as session:
        file = UploadFileRow(path=path, size=1, sha256=digest, tensors=[{"name": "old"}])
        first = UploadRepository(session, LOCAL_TENANT).add(UploadKind.CHECKPOINT, [file]).id
    with database.read_scope() as session:
        uploads = UploadRepository(session, LOCAL_TENANT)
        known = uploads.stored_files(UploadKind.CHECKPOINT, [digest])[digest]
    with database.session_scope() as session:
        uploads = UploadRepository(session, LOCAL_TENANT)
        upload = uploads.find(first, lock=True)
        assert upload is not None
        if change == "replaced":
            other = UploadFileRow(path=path, size=1, sha256="c" * 64, tensors=[{"name": "new"}])
            uploads.put_file(upload, other)
        elif change == "awaited":
            uploads.forget_damaged(upload, digest)
        else:
            uploads.abort(upload)
    with database.session_scope() as session:
        uploads = UploadRepository(session, LOCAL_TENANT)
        second = uploads.add(UploadKind.CHECKPOINT, [uploads.copy_of(known, path)])
        assert [(file.sha256, file.stored) for file in second.files] == [(digest, False)]
        assert uploads.tensors(second) == {path: []}


def test_a_calibration_text_is_read_as_it_was_last_uploaded(database: Database) -> None:
    digest = "d" * 64
    with database.session_scope() as session:
        assert UploadRepository(session, LOCAL_TENANT).calibration_suffix(digest) is None
    for suffix in (".txt", ".jsonl", ".txt"):
        with database.session_scope() as session:
            uploads = UploadRepository(session, LOCAL_TENANT)
            upload = uploads.add(UploadKind.CALIBRATION)
            file = UploadFileRow(path=f"text{suffix}", size=1, sha256=digest, tensors=[])
            uploads.put_file(upload, file)
            upload.calibration_digest = digest
            uploads.complete(upload)
            assert uploads.calibration_suffix(digest) == suffix
            # Somebody else's upload is none of this tenant's.
            assert UploadRepository(session, "ten_other").calibration_suffix(digest) is None


def test_only_open_uploads_can_be_abandoned_or_aborted(database: Database) -> None:
    with database.session_scope() as session:
        uploads = UploadRepository(session, LOCAL_TENANT)
        upload = uploads.add(UploadKind.CALIBRATION)
        now = database_now(session)
        assert uploads.abandoned(now - timedelta(hours=1), 10) == []
        assert uploads.abandoned(now + timedelta(hours=1), 10) == [upload.id]
        upload.calibration_digest = "d" * 64
        uploads.complete(upload)
        assert uploads.abandoned(now + timedelta(hours=1), 10) == []
        uploads.abort(upload)
        assert upload.state is UploadState.COMPLETE


def test_versions_increase_and_deleted_ones_are_not_reused(database: Database) -> None:
    with database.session_scope() as session:
        deltas = DeltaRepository(session, LOCAL_TENANT)
        first, second = add_delta(session), add_delta(session)
        assert (first.version, second.version, add_delta(session, "p/other").version) == (1, 2, 1)
        deltas.delete(second)
        assert deltas.find(second.id) is None
        assert deltas.resolve("p/m:2") is None
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


def test_pages_contain_every_delta_once_in_every_order(database: Database) -> None:
    with database.session_scope() as session:
        made = [add_delta(session, f"p/{number % 3}") for number in range(7)]
        for delta in made[:5]:
            make_ready(session, delta)
        ready = [delta.id for delta in made[:5]]
    orders = {
        DeltaSort.NEWEST: [delta.id for delta in made[::-1]],
        DeltaSort.NAME: [delta.id for delta in sorted(made, key=lambda d: (d.name, d.version))],
        DeltaSort.SIZE: sorted(ready, reverse=True),
        DeltaSort.KL: sorted(ready),
    }
    with database.session_scope() as session:
        deltas = DeltaRepository(session, LOCAL_TENANT)
        for sort, order in orders.items():
            seen: list[str] = []
            after = None
            while page := deltas.page(limit=2, sort=sort, after=after):
                seen += [delta.id for delta in page]
                after = key_of(page[-1], sort)
            assert seen == order, sort
        first = deltas.page(limit=2)
        deltas.delete(
            deltas.session.get_one(DeltaRow, first[-1].id)
        )  # the last delta of a page may be deleted before the next page
        rest = deltas.page(limit=9, after=key_of(first[-1], DeltaSort.NEWEST))
        assert [delta.id for delta in rest] == orders[DeltaSort.NEWEST][2:]


@pytest.mark.parametrize("rare", [0, 500], ids=["by the sort", "by the filter"])
def test_filters_combine_whatever_drives_the_statement(
    database: Database, monkeypatch: pytest.MonkeyPatch, rare: int
) -> None:
    monkeypatch.setattr(listing, "RARE", rare)
    with database.session_scope() as session:
        deltas = DeltaRepository(session, LOCAL_TENANT)
        made = [add_delta(session, f"p/{number % 2}") for number in range(6)]
        for number, delta in enumerate(made):
            delta.method = "exact" if number < 3 else "adamix"
            delta.created_by = f"key_{number % 3}"
        for delta in made[1:5]:
            make_ready(session, delta)
        base_id = made[0].base_id
        queries = {
            DeltaFilter(): made,
            DeltaFilter(base_id=base_id, method="exact"): made[:3],
            DeltaFilter(base_id="other"): [],
            DeltaFilter(state=JobState.READY): made[1:5],
            DeltaFilter(state=JobState.READY, method="exact", name="p/1"): [made[1]],
            DeltaFilter(state=JobState.QUEUED, method="adamix"): [made[5]],
            DeltaFilter(created_by="key_1"): [made[1], made[4]],
            DeltaFilter(name="p/0"): made[::2],
        }
        for wanted, expected in queries.items():
            for sort in (DeltaSort.NEWEST, DeltaSort.NAME):
                found = deltas.page(limit=9, wanted=wanted, sort=sort)
                assert {delta.id for delta in found} == {delta.id for delta in expected}
                first = deltas.page(limit=1, wanted=wanted, sort=sort)
                assert [delta.id for delta in first] == [delta.id for delta in found[:1]]


def test_jobs_of_several_states_are_one_list(database: Database) -> None:
    with database.session_scope() as session:
        made = [add_delta(session) for _ in range(5)]
        job_ids = [delta.job.id for delta in made]
        make_ready(session, made[3])
        jobs = JobRepository(session, LOCAL_TENANT)
        jobs.request_cancel(job_ids[1])
        ended = JobFilter(states=(JobState.READY, JobState.CANCELLED), base_id=made[0].base_id)
        assert [job.id for job in jobs.page(limit=9)] == job_ids[::-1]
        found = [job.id for job in jobs.page(limit=9, wanted=ended)]
        assert found == [job_ids[3], job_ids[1]]
        first = jobs.page(limit=1, wanted=ended)
        rest = jobs.page(limit=9, wanted=ended, after=key_of_job(first[0]))
        assert [job.id for job in (*first, *rest)] == found


def test_of_many_stored_files_with_the_same_bytes_one_is_read(database: Database) -> None:
    def add(tenant: str, sha256: str, *, stored: bool = True) -> None:
        uploads = UploadRepository(session, tenant)
        file = UploadFileRow(path="a.json", size=1, sha256=sha256, stored=stored, tensors=[])
        uploads.add(UploadKind.CHECKPOINT, [file])

    read: list[object] = []

    def record(row: object, _: object) -> None:
        read.append(row)

    with database.session_scope() as session:
        session.add(TenantRow(id="ten_other", name="other"))
        session.flush()
        for tenant in (*["ten_other"] * 2, *[LOCAL_TENANT] * 3):
            add(tenant, "a" * 64)
        add("ten_other", "b" * 64)
        add(LOCAL_TENANT, "c" * 64, stored=False)
    with database.read_scope() as session:
        event.listen(UploadFileRow, "load", record)
        found = UploadRepository(session, LOCAL_TENANT).stored_files(
            UploadKind.CHECKPOINT, ["a" * 64, "b" * 64, "c" * 64]
        )
        event.remove(UploadFileRow, "load", record)
    assert list(found) == ["a" * 64]
    assert len(read) == 1
