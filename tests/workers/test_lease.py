"""The heartbeat renews a lease and detects its loss."""

import os
import subprocess
import time
from collections.abc import Callable

import pytest
import sqlalchemy.exc

from deltadock.compression.progress import Progress
from deltadock.errors import Cancelled
from deltadock.storage.leases import new_owner
from deltadock.storage.repositories import JobRepository
from deltadock.storage.repositories.jobs import JobProgress
from deltadock.storage.tables import JobRow, JobState
from deltadock.storage.tenancy import LOCAL_TENANT
from deltadock.workers.compress import WorkerContext, _reporter
from deltadock.workers.lease import (
    STOPPING,
    Lease,
    LeaseLostError,
    WorkerStoppingError,
    expire_leases_of_dead,
)
from deltadock.workers.metrics import StageClock
from tests.waiting import wait_until

SECONDS = 0.6


@pytest.fixture
def job_id(context: WorkerContext, submit: Callable[..., str]) -> str:
    job_id = submit()
    with context.database.session_scope() as session:
        assert JobRepository(session, LOCAL_TENANT).acquire(job_id, "me", SECONDS)
    return job_id


def advance(lease: Lease, percent: float = 10.0) -> None:
    lease.advance(JobProgress(JobState.COMPRESSING, 1, 4, percent, "block 1"))


def test_the_heartbeat_renews_the_lease_until_it_ends(
    context: WorkerContext, job_id: str, look: Callable[[str], JobRow]
) -> None:
    first = look(job_id).lease_expires_at
    assert first is not None
    with Lease(context.database, job_id, "me", SECONDS):
        wait_until(lambda: (look(job_id).lease_expires_at or first) > first)
    last = look(job_id).lease_expires_at
    time.sleep(SECONDS / 2)  # longer than a heartbeat interval: the heartbeat has stopped
    assert look(job_id).lease_expires_at == last


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_the_heartbeat_goes_on_after_any_error(
    context: WorkerContext, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    renew = JobRepository.renew
    renewals: list[bool] = []
    failures = iter([sqlalchemy.exc.TimeoutError(), RuntimeError()])

    def fail_twice(self: JobRepository, job_id: str, owner: str, seconds: float) -> bool:
        if error := next(failures, None):
            raise error
        renewals.append(renew(self, job_id, owner, seconds))
        return renewals[-1]

    monkeypatch.setattr(JobRepository, "renew", fail_twice)
    with Lease(context.database, job_id, "me", SECONDS) as lease:
        wait_until(lambda: bool(renewals))
        assert lease.held == renewals[0]


def test_only_leases_of_this_machines_dead_workers_are_ended(
    context: WorkerContext, submit: Callable[..., str], look: Callable[[str], JobRow]
) -> None:
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    own = new_owner()
    owners = {
        submit(bits=1.0): own,
        submit(bits=1.5): own.replace(f"-{os.getpid()}-", f"-{dead.pid}-"),
        submit(bits=2.0): f"another-machine-{dead.pid}-{own[-12:]}",
    }
    with context.database.session_scope() as session:
        for job, owner in owners.items():
            assert JobRepository(session, LOCAL_TENANT).acquire(job, owner, 3600)
    expire_leases_of_dead(context.database)
    with context.database.read_scope() as session:
        live = JobRepository(session, LOCAL_TENANT).leases()
        lost = JobRepository(session, LOCAL_TENANT).stale()
    ours, gone, foreign = owners
    assert live == {ours: own, foreign: owners[foreign]}
    assert lost == [gone]
    assert look(gone).message == "waiting for a worker to continue"


def test_a_lost_lease_raises_at_the_next_step(
    context: WorkerContext, job_id: str, set_job: Callable[..., None]
) -> None:
    with Lease(context.database, job_id, "me", SECONDS) as lease:
        advance(lease)
        set_job(job_id, lease_owner="another")
        with pytest.raises(LeaseLostError):
            advance(lease)
        with pytest.raises(LeaseLostError):
            lease.finish(JobState.READY)


def test_the_heartbeat_detects_a_lost_lease(
    context: WorkerContext, job_id: str, set_job: Callable[..., None]
) -> None:
    with Lease(context.database, job_id, "me", SECONDS) as lease:
        set_job(job_id, lease_owner="another")
        wait_until(lambda: not lease.held)
        set_job(job_id, lease_owner="me")  # too late: another worker has had the job
        with pytest.raises(LeaseLostError):
            advance(lease)


def test_shutdown_and_cancel_take_effect_at_the_next_step(
    context: WorkerContext, job_id: str
) -> None:
    with Lease(context.database, job_id, "me", SECONDS) as lease:
        STOPPING.set()
        try:
            with pytest.raises(WorkerStoppingError):
                advance(lease)
        finally:
            STOPPING.clear()
        with context.database.session_scope() as session:
            JobRepository(session, LOCAL_TENANT).request_cancel(job_id)
        with pytest.raises(Cancelled):
            advance(lease)


def test_a_throttled_report_still_checks_for_cancellation(
    context: WorkerContext, job_id: str
) -> None:
    with Lease(context.database, job_id, "me", SECONDS) as lease:
        report = _reporter(lease, StageClock())
        step = Progress("encoding", 1, 4, 0.5, 0.4, "matrix 1")
        report(step)
        with context.database.session_scope() as session:
            JobRepository(session, LOCAL_TENANT).request_cancel(job_id)
        with pytest.raises(Cancelled):
            report(step)
