"""Lost tasks are resent and leftovers removed; live jobs and uploads are kept."""

import platform
import subprocess
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from kombu.exceptions import OperationalError
from structlog.testing import capture_logs

from deltadock.errors import Unavailable
from deltadock.storage.leases import new_owner
from deltadock.storage.repositories import JobRepository, UploadRepository
from deltadock.storage.tables import JobState, UploadKind, UploadState
from deltadock.storage.tenancy import LOCAL_TENANT
from deltadock.workers.compress import WorkerContext
from deltadock.workers.files import AttemptFiles, drop_unneeded
from deltadock.workers.sweeper import Periodic, drop_abandoned, drop_job_folders, resend_lost
from tests.workers.conftest import job_files

Submit = Callable[..., str]
SetJob = Callable[..., None]

OWNER = "machine-1-a"
LONG_AGO = datetime.now(UTC) - timedelta(days=2)


def resend(context: WorkerContext, *, queue_is_empty: bool = True) -> list[str]:
    sent: list[str] = []
    assert resend_lost(context, sent.append, lambda: queue_is_empty) == sent
    return sent


def test_a_lost_task_is_resent_once(
    context: WorkerContext, submit: Submit, set_job: SetJob
) -> None:
    job_id = submit()
    assert resend(context) == [], "its task may still be in flight"
    set_job(job_id, sent_at=LONG_AGO)
    assert resend(context, queue_is_empty=False) == [], "a worker takes it in its turn"
    assert resend(context) == [job_id]


def test_a_job_is_resent_once_its_lease_has_expired(
    context: WorkerContext, submit: Submit, set_job: SetJob
) -> None:
    job_id = submit()
    with context.database.session_scope() as session:
        assert JobRepository(session, LOCAL_TENANT).acquire(job_id, "worker", 60.0)
    set_job(job_id, sent_at=LONG_AGO)
    assert resend(context) == []
    set_job(job_id, lease_expires_at=LONG_AGO)
    assert resend(context) == [job_id]


def test_a_task_that_the_broker_did_not_take_is_sent_again(
    context: WorkerContext, submit: Submit, set_job: SetJob
) -> None:
    job_id = submit()
    with context.database.session_scope() as session:
        assert JobRepository(session, LOCAL_TENANT).acquire(job_id, "killed", 60.0)
    set_job(job_id, sent_at=LONG_AGO, lease_expires_at=LONG_AGO + timedelta(hours=1))

    def broken(*_: object) -> None:
        raise OperationalError("the broker restarts")

    with pytest.raises(OperationalError):
        resend_lost(context, broken, lambda: True)
    assert resend(context) == [job_id]


def test_abandoned_uploads_and_their_parts_are_dropped(context: WorkerContext) -> None:
    old, busy, new = (UploadState.OPEN, UploadState.COMPLETING, UploadState.OPEN)
    with context.database.session_scope() as session:
        uploads = UploadRepository(session, LOCAL_TENANT)
        rows = [uploads.add(UploadKind.CHECKPOINT) for _ in (old, busy, new)]
        for row, state in zip(rows, (old, busy, new), strict=True):
            row.state = state
        for row in rows[:2]:
            row.updated_at = LONG_AGO
    for upload in (*(row.id for row in rows), "upl_unknown"):
        context.blobs.begin_parts(upload, 100, 10)
    with context.blobs.writer() as writer:
        writer.write(b"still arriving")
        assert drop_abandoned(context) == 2
        writer.commit("0" * 64)
    with context.database.read_scope() as session:
        found = [UploadRepository(session, LOCAL_TENANT).find(row.id) for row in rows]
    assert [upload.state for upload in found if upload] == [
        UploadState.ABORTED,
        UploadState.ABORTED,
        UploadState.OPEN,
    ]
    assert context.blobs.parted_uploads() == {rows[2].id}


def test_only_files_of_finished_jobs_are_dropped(
    context: WorkerContext, submit: Submit, set_job: SetJob
) -> None:
    job_id = submit()
    with context.database.session_scope() as session:
        assert JobRepository(session, LOCAL_TENANT).acquire(job_id, OWNER, 60.0)
    AttemptFiles(context.settings, job_id, f"{OWNER}-before").enter()
    AttemptFiles(context.settings, job_id, OWNER).enter()
    assert drop_job_folders(context) == 1
    assert job_files(context) == [f"{job_id}.{OWNER}"]
    AttemptFiles(context.settings, job_id, OWNER).leave()
    assert drop_job_folders(context) == 0
    set_job(job_id, state=JobState.CANCELLED)
    assert drop_job_folders(context) == 1
    assert job_files(context) == []


def test_files_are_entered_or_dropped_but_never_both(
    context: WorkerContext, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job is retried, and begun on this machine, while its left files are being dropped."""
    job_id = submit()
    before, after = (AttemptFiles(context.settings, job_id, one) for one in ("a-1-a", "a-1-b"))
    (before.enter() / "fetched").touch()
    before.leave()
    entered: list[Path] = []

    def looked(*_: object) -> bool:
        entered.append(after.enter())
        return False

    assert drop_unneeded(context.settings, looked) == 0
    assert [path.name for path in entered[0].iterdir()] == ["fetched"]


def test_an_attempt_goes_on_with_the_files_of_one_that_died_or_left(
    context: WorkerContext, submit: Submit
) -> None:
    job_id = submit()
    dead = subprocess.Popen(["true"])
    dead.wait()
    owners = [f"{platform.node()}-{dead.pid}-a", new_owner(), new_owner(), new_owner()]
    died, left, stays, last = (AttemptFiles(context.settings, job_id, one) for one in owners)
    (died.enter() / "fetched").touch()
    assert [path.name for path in left.enter().iterdir()] == ["fetched"]
    left.leave()
    assert [path.name for path in stays.enter().iterdir()] == ["fetched"]
    assert list(last.enter().iterdir()) == [], "the other is at work"
    last.leave()
    stays.leave()
    assert job_files(context) == [f"{job_id}.left"]


def test_a_step_is_repeated_and_an_expected_failure_is_one_line() -> None:
    failures: list[Exception] = [
        Unavailable("No database."),
        ExceptionGroup("of tasks", [Unavailable("No store.")]),
        RuntimeError("a defect"),
    ]
    done = threading.Event()

    def step() -> None:
        if failures:
            raise failures.pop(0)
        done.set()

    periodic = Periodic("webhooks", step, 0.001)
    with capture_logs() as lines:
        periodic.start()
        assert done.wait(10)
        periodic.stop()
    assert [(line["log_level"], line.get("errors"), "exc_info" in line) for line in lines] == [
        ("warning", ["No database."], False),
        ("warning", ["No store."], False),
        ("error", None, True),
    ]
