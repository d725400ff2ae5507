"""Job leases and states: examples on both databases, and a state machine."""

import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from deltadock.storage import repositories
from deltadock.storage.database import Database
from deltadock.storage.repositories import DeltaRepository, JobRepository, TenantRepository
from deltadock.storage.repositories.jobs import MAX_LOG_LINES, JobProgress
from deltadock.storage.tables import (
    RUNNING_ORDER,
    BaseRow,
    CheckpointRow,
    JobPriority,
    JobRow,
    JobState,
    TableRow,
)
from deltadock.storage.tenancy import EVERY_TENANT, LOCAL_TENANT

URGENCY = [JobPriority.HIGH, JobPriority.NORMAL, JobPriority.LOW]
NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
LEASE = 60.0


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def add_job(session: Session, number: int = 0) -> JobRow:
    checkpoint = CheckpointRow(
        digest="a" * 64, weights_digest="a" * 64, model_type="llama", total_bytes=1
    )
    base = BaseRow(
        id="base_1", tenant_id=LOCAL_TENANT, name="tiny", checkpoint=session.merge(checkpoint)
    )
    delta = DeltaRepository(session, LOCAL_TENANT).add(
        name=f"p/m{number}",
        base=session.merge(base),
        checkpoint_digest=checkpoint.digest,
        method="adamix",
        bits=1.0,
        options={"seed": 0, "solver": "exact", "goal": None, "calibration": None},
        fingerprint="f" * 64,
    )
    delta.job.sent_at = delta.job.created_at = NOW
    session.flush()
    return delta.job


@pytest.fixture
def session(database: Database) -> Iterator[Session]:
    with database.session_scope() as session:
        yield session


class Clock:
    """In place of the database's clock."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self, _session: Session) -> datetime:
        return self.now

    def set(self, seconds: float) -> None:
        self.now = later(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(repositories.jobs, "database_now", clock)
    return clock


@pytest.fixture
def jobs(session: Session, clock: Clock) -> JobRepository:
    return JobRepository(session, LOCAL_TENANT)


@pytest.fixture
def job(session: Session) -> JobRow:
    return add_job(session)


def progress(state: JobState, percent: float, seconds_left: float | None = None) -> JobProgress:
    return JobProgress(state, 1, 4, percent, "layer 1", seconds_left)


def test_a_live_lease_excludes_other_workers(
    jobs: JobRepository, job: JobRow, clock: Clock
) -> None:
    held = jobs.acquire(job.id, "one", LEASE)
    assert held is not None
    assert (held.attempt, held.delta.base.checkpoint.digest) == (1, "a" * 64)
    clock.set(59)
    assert jobs.acquire(job.id, "two", LEASE) is None
    assert not jobs.renew(job.id, "two", LEASE)
    assert not jobs.advance(job.id, "two", progress(JobState.VALIDATING, 1))
    assert not jobs.finish(job.id, "two", JobState.FAILED)
    found = jobs.find(job.id)
    assert found is not None
    assert found.state is JobState.QUEUED


def test_an_expired_lease_can_be_acquired(jobs: JobRepository, job: JobRow, clock: Clock) -> None:
    jobs.acquire(job.id, "one", LEASE)
    clock.set(60)
    taken = jobs.acquire(job.id, "two", LEASE)
    assert taken is not None
    assert taken.attempt == 2
    clock.set(61)
    assert not jobs.renew(job.id, "one", LEASE)
    assert not jobs.finish(job.id, "one", JobState.READY)


def test_the_time_without_a_worker_is_counted(
    jobs: JobRepository, job: JobRow, clock: Clock
) -> None:
    clock.set(100)
    jobs.acquire(job.id, "one", LEASE)
    clock.set(110)
    jobs.release(job.id, "one")
    clock.set(140)
    jobs.acquire(job.id, "two", LEASE)
    clock.set(150)
    jobs.advance(job.id, "two", progress(JobState.CALIBRATING, 20.0))
    clock.set(300)
    taken = jobs.acquire(job.id, "three", LEASE)  # "two" has died
    assert taken is not None
    assert taken.idle_seconds == pytest.approx(30 + 150)
    clock.set(310)
    jobs.release(job.id, "three")
    clock.set(400)
    cancelled = jobs.request_cancel(job.id)
    assert cancelled is not None
    assert cancelled.idle_seconds == pytest.approx(30 + 150 + 90), "10 + 10 + 10 s of work"
    clock.set(500)
    assert jobs.retry(job.id)
    clock.set(600)
    taken = jobs.acquire(job.id, "four", LEASE)
    assert taken is not None
    assert taken.idle_seconds == 0.0, "the wait before the first worker is no part of it"


def test_a_renewed_lease_expires_later(jobs: JobRepository, job: JobRow, clock: Clock) -> None:
    jobs.acquire(job.id, "one", LEASE)
    clock.set(50)
    assert jobs.renew(job.id, "one", LEASE)
    clock.set(100)
    assert jobs.acquire(job.id, "two", LEASE) is None


def test_a_released_lease_can_be_acquired_immediately(
    jobs: JobRepository, job: JobRow, clock: Clock
) -> None:
    jobs.acquire(job.id, "one", LEASE)
    jobs.advance(job.id, "one", progress(JobState.CALIBRATING, 20.0))
    clock.set(1)
    assert not jobs.release(job.id, "two")
    assert jobs.release(job.id, "one")
    waiting = jobs.find(job.id)
    assert waiting is not None
    assert (waiting.percent, waiting.message) == (20.0, "waiting for a worker to continue")
    taken = jobs.acquire(job.id, "two", LEASE)
    assert taken is not None
    assert (taken.attempt, taken.message) == (1, "repeating unsaved steps")
    assert [line.message for line in jobs.log(job.id, after=0, limit=9)] == [
        "Attempt 1 starts on one.",
        "one shuts down; another worker continues.",
        "Attempt 1 continues on two.",
    ]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (None, "repeating unsaved steps, as one has died"),
        ("The store is down.", "repeating unsaved steps after an error: The store is down."),
    ],
)
def test_a_job_that_is_tried_again_says_why(
    jobs: JobRepository, job: JobRow, error: str | None, why: str
) -> None:
    jobs.acquire(job.id, "one", LEASE)
    jobs.advance(job.id, "one", progress(JobState.CALIBRATING, 20.0))
    assert jobs.expire(job.id, "one", error)
    waiting = jobs.find(job.id)
    assert waiting is not None
    assert waiting.message.endswith(error or "waiting for a worker to continue")
    taken = jobs.acquire(job.id, "two", LEASE)
    assert taken is not None
    assert (taken.attempt, taken.percent, taken.message) == (2, 20.0, why)
    (*_, last) = jobs.log(job.id, after=0, limit=9)
    assert (
        last.message
        == f"Attempt 2 continues on two{why.removeprefix('repeating unsaved steps').rstrip('.')}."
    )


def test_one_of_many_concurrent_workers_acquires_the_lease(database: Database) -> None:
    with database.session_scope() as session:
        job_id = add_job(session).id

    def acquire(owner: int) -> bool:
        with database.session_scope() as session:
            return (
                JobRepository(session, LOCAL_TENANT).acquire(job_id, f"worker {owner}", LEASE)
                is not None
            )

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(acquire, range(8))) == 1


def test_progress_never_decreases(jobs: JobRepository, job: JobRow) -> None:
    jobs.acquire(job.id, "one", LEASE)
    assert jobs.advance(job.id, "one", progress(JobState.COMPRESSING, 40))
    assert jobs.advance(job.id, "one", progress(JobState.VALIDATING, 2))
    assert jobs.advance(job.id, "one", progress(JobState.COMPRESSING, 30, seconds_left=9.0))
    found = jobs.find(job.id)
    assert found is not None
    assert (found.state, found.percent, found.stage_block) == (JobState.COMPRESSING, 40.0, 1)
    assert found.expected_at == later(9), "the end is known before the old percentage is reached"
    assert jobs.advance(job.id, "one", progress(JobState.VERIFYING, 50))
    assert jobs.advance(job.id, "one", progress(JobState.COMPRESSING, 51))
    found = jobs.find(job.id)
    assert found is not None
    assert (found.state, found.percent) == (JobState.COMPRESSING, 51.0), "a search tries again"


def test_finish_needs_a_final_state_and_advance_another(jobs: JobRepository, job: JobRow) -> None:
    with pytest.raises(ValueError, match="final"):
        jobs.advance(job.id, "one", progress(JobState.READY, 100))
    with pytest.raises(ValueError, match="not final"):
        jobs.finish(job.id, "one", JobState.COMPRESSING)


def test_a_finished_job_stays_finished(jobs: JobRepository, job: JobRow, clock: Clock) -> None:
    jobs.acquire(job.id, "one", LEASE)
    assert jobs.finish(job.id, "one", JobState.FAILED, error_code="x", error_message="y")
    clock.set(1000)
    assert jobs.acquire(job.id, "one", LEASE) is None
    assert not jobs.advance(job.id, "one", progress(JobState.VERIFYING, 99))
    found = jobs.request_cancel(job.id)
    assert found is not None
    assert (found.state, found.error_code, found.cancel_requested) == (JobState.FAILED, "x", False)
    assert (found.finished_at, found.lease_owner) == (NOW, None)


def test_cancelling_an_unleased_job_ends_it(jobs: JobRepository, job: JobRow) -> None:
    cancelled = jobs.request_cancel(job.id)
    assert cancelled is not None
    assert (cancelled.state, cancelled.error_code) == (JobState.CANCELLED, "cancelled")


def test_cancelling_a_running_job_sets_a_request_for_its_worker(
    jobs: JobRepository, job: JobRow, clock: Clock
) -> None:
    jobs.acquire(job.id, "one", LEASE)
    step = JobProgress(JobState.COMPRESSING, 1, 3, 31.0, "block 2 of 3", seconds_left=59)
    assert jobs.advance(job.id, "one", step)
    clock.set(1)
    asked = jobs.request_cancel(job.id)
    assert asked is not None
    assert (asked.state, asked.cancel_requested) == (JobState.COMPRESSING, True)
    assert asked.message == "Cancellation requested, ends at its next step"
    assert asked.expected_at is None
    reason = {"error_code": "cancelled", "error_message": "Cancelled on request."}
    assert jobs.finish(job.id, "one", JobState.CANCELLED, **reason)
    ended = jobs.find(job.id)
    assert ended is not None
    assert ended.message == ""
    assert jobs.log(job.id, after=0, limit=9)[-1].message == "Cancelled on request."


def test_cancelling_a_job_with_an_expired_lease_ends_it(
    jobs: JobRepository, job: JobRow, clock: Clock
) -> None:
    jobs.acquire(job.id, "one", LEASE)
    clock.set(60)
    asked = jobs.request_cancel(job.id)
    assert asked is not None
    assert asked.state is JobState.CANCELLED
    assert jobs.request_cancel("job_unknown") is None


def test_tenants_take_turns(session: Session, clock: Clock) -> None:
    """The operator has six jobs before anybody else has one; priorities are a tenant's own."""
    tenants = {name: TenantRepository(session).add(name).id for name in ("b", "c")}
    rows = [add_job(session, number) for number in range(9)]
    for row in rows[6:8]:
        row.tenant_id, row.priority = tenants["b"], JobPriority.HIGH
    rows[8].tenant_id = tenants["c"]
    for number, row in enumerate(rows):
        row.sent_at = later(number)
    session.flush()
    jobs = JobRepository(session, EVERY_TENANT)
    order = [0, 6, 8, 1, 7, 2, 3, 4, 5]
    places = {rows[number].id: place for place, number in enumerate(order, start=1)}
    assert jobs.positions(rows) == places

    taken = []
    for turn in range(9):  # one worker
        clock.set(10 + turn)
        job = jobs.acquire_next("worker", LEASE)
        assert job is not None
        taken.append(rows.index(job))
        jobs.finish(job.id, "worker", JobState.READY)
    assert taken == order
    assert jobs.acquire_next("worker", LEASE) is None


def test_a_job_at_work_without_a_time_of_its_start_is_taken(session: Session) -> None:
    """As releases left it that did not note when a job had started."""
    row = add_job(session, 0)
    row.state, row.attempt = JobState.ASSEMBLING, 1
    session.flush()
    job = JobRepository(session, EVERY_TENANT).acquire_next("worker", LEASE)
    assert job is not None
    assert (job.id, job.attempt) == (row.id, 2)


def test_a_retry_is_no_way_to_be_next(session: Session, clock: Clock) -> None:
    other = TenantRepository(session).add("other").id
    rows = [add_job(session, number) for number in range(5)]
    rows[0].tenant_id = other
    session.flush()
    jobs = JobRepository(session, EVERY_TENANT)
    taken = []
    for turn in range(4):
        clock.set(turn)
        job = jobs.acquire_next("worker", LEASE)
        assert job is not None
        taken.append(job.tenant_id == other)
        jobs.finish(job.id, "worker", JobState.FAILED)
        if job.tenant_id == other:
            assert jobs.retry(job.id)
    assert sorted(taken) == [False, False, True, True]


def test_a_job_that_waits_after_an_error_is_not_at_work(session: Session, clock: Clock) -> None:
    rows = [add_job(session, number) for number in range(2)]
    jobs = JobRepository(session, EVERY_TENANT)
    first = jobs.acquire_next("worker", LEASE)
    assert first is not None
    assert jobs.expire(first.id, "worker", "The store does not answer.", wait_seconds=15)
    assert jobs.leases() == {}
    second = jobs.acquire_next("worker", LEASE)
    assert second is not None
    assert {first.id, second.id} == {row.id for row in rows}
    clock.set(14)
    assert jobs.acquire_next("another", LEASE) is None
    assert jobs.stale(queued_seconds=0) == []
    clock.set(15)
    assert jobs.stale(queued_seconds=0) == [first.id]
    assert jobs.acquire_next("another", LEASE) is first


def test_who_has_the_fewest_jobs_at_work_is_next(session: Session, clock: Clock) -> None:
    other = TenantRepository(session).add("other").id
    rows = [add_job(session, number) for number in range(5)]
    for number, row in enumerate(rows):
        row.sent_at = later(number)
    for row in rows[3:]:
        row.tenant_id = other
    session.flush()
    jobs = JobRepository(session, EVERY_TENANT)
    clock.set(1)
    assert jobs.acquire(rows[3].id, "long", 1000)
    clock.set(2)
    assert jobs.acquire(rows[0].id, "short", 1000)
    clock.set(3)
    jobs.finish(rows[0].id, "short", JobState.READY)
    assert jobs.positions(rows[1:3] + rows[4:]) == {rows[1].id: 1, rows[4].id: 2, rows[2].id: 3}


def test_two_workers_take_two_jobs(database: Database) -> None:
    with database.session_scope() as session:
        rows = [add_job(session, number) for number in range(12)]
        for row, priority in zip(rows, [*JobPriority] * 4, strict=True):
            row.priority = priority
        ids = {row.id for row in rows}

    def take(worker: str) -> list[str]:
        taken = []
        while True:
            with database.session_scope() as session:
                job = JobRepository(session, EVERY_TENANT).acquire_next(worker, LEASE)
            if job is None:
                return taken
            taken.append(job.id)

    with ThreadPoolExecutor(3) as workers:
        taken = [job_id for found in workers.map(take, ("one", "two", "three")) for job_id in found]
    assert len(taken) == len(ids)
    assert set(taken) == ids


def test_waiting_jobs_are_placed_by_priority_and_then_by_their_turn(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = JobRepository(session, LOCAL_TENANT)
    order = [JobPriority.LOW, JobPriority.NORMAL, JobPriority.HIGH, JobPriority.NORMAL]
    rows = [add_job(session, number) for number in range(5)]
    for row, priority in zip(rows, [*order, JobPriority.HIGH], strict=True):
        row.priority, row.sent_at = priority, later(rows.index(row))
    session.flush()
    jobs.acquire(rows[4].id, "one", LEASE)
    session.refresh(rows[4])
    places = {rows[2].id: 1, rows[1].id: 2, rows[3].id: 3, rows[0].id: 4}
    assert jobs.positions(rows) == places
    jobs.release(rows[4].id, "one")
    session.refresh(rows[4])
    behind = {job_id: place + 1 for job_id, place in places.items()}
    assert jobs.positions(rows) == behind | {rows[4].id: 1}, "it has begun, so it is next"
    jobs.acquire(rows[4].id, "two", LEASE)
    session.refresh(rows[4])
    monkeypatch.setattr("deltadock.storage.repositories.jobs.MAX_POSITION", 2)
    assert jobs.positions(rows) == places | {rows[3].id: 3, rows[0].id: 3}


@pytest.mark.parametrize("walks", [5, 200])
def test_the_queue_is_its_definition_however_much_of_it_is_read(
    session: Session, monkeypatch: pytest.MonkeyPatch, walks: int
) -> None:
    """Tenants by their turns; each with other numbers of jobs, at work and that wait."""
    monkeypatch.setattr("deltadock.storage.repositories.jobs.MAX_WALKS", walks)
    chance = random.Random(0)
    tenants = [TenantRepository(session).add(name) for name in "abcd"]
    for tenant, served in zip(tenants, (None, None, 5, 3), strict=True):
        tenant.served_at = None if served is None else later(served)
    rows = [add_job(session, number) for number in range(70)]
    working: Counter[str] = Counter()
    for row in rows:
        tenant = tenants[chance.choice((0, 0, 0, 0, 1, 2, 2, 3))]
        row.tenant_id, row.priority = tenant.id, chance.choice(list(JobPriority))
        row.sent_at = later(chance.randrange(30))
        if chance.random() < 0.1:
            row.started_at, row.lease_owner, row.lease_expires_at = NOW, "w", later(3600)
            working[tenant.id] += 1
    session.flush()
    clock = Clock()
    monkeypatch.setattr("deltadock.storage.repositories.jobs.database_now", clock)
    served_at = {tenant.id: tenant.served_at for tenant in tenants}
    turns = []
    for job in sorted(rows, key=lambda row: (URGENCY.index(row.priority), row.sent_at, row.id)):
        if job.started_at is None:
            working[job.tenant_id] += 1
            served = served_at[job.tenant_id]
            turn = working[job.tenant_id], served is not None, served, job.sent_at
            turns.append((*turn, job.id))
    queue = [job_id for *_, job_id in sorted(turns)]
    jobs = JobRepository(session, EVERY_TENANT)
    for limit in (1, 2, 9, 40, 100):
        assert jobs._queue(limit) == queue[:limit]


def test_a_jobs_log_keeps_its_newest_lines(jobs: JobRepository, job: JobRow) -> None:
    for number in range(MAX_LOG_LINES + 2):
        jobs.write_log(job.id, f"line {number}")
    lines = jobs.log(job.id, after=0, limit=2000)
    assert [lines[0].message, lines[-1].message] == ["line 2", f"line {MAX_LOG_LINES + 1}"]
    assert len(lines) == MAX_LOG_LINES
    assert [line.id for line in jobs.log(job.id, after=lines[-2].id, limit=5)] == [lines[-1].id]


def test_the_expected_end_follows_from_the_latest_progress(
    jobs: JobRepository, job: JobRow, clock: Clock
) -> None:
    def expected() -> datetime | None:
        found = jobs.find(job.id)
        assert found is not None
        return found.expected_at

    jobs.acquire(job.id, "one", LEASE)
    step = progress(JobState.CALIBRATING, 20, seconds_left=40.0)
    clock.set(10)
    jobs.advance(job.id, "one", step)
    assert expected() == later(50)
    clock.set(70)
    jobs.acquire(job.id, "two", LEASE)
    assert expected() is None, "nothing is known about the second worker's rate"


def test_stale_jobs_have_an_expired_lease_or_a_lost_task(
    jobs: JobRepository, job: JobRow, clock: Clock
) -> None:
    def stale(seconds: float) -> list[str]:
        clock.set(seconds)
        return list(jobs.stale(queued_seconds=120))

    assert stale(119) == []
    assert stale(120) == [job.id]
    clock.set(200)
    jobs.acquire(job.id, "one", LEASE)
    assert stale(259) == []
    assert stale(260) == [job.id]
    jobs.finish(job.id, "one", JobState.READY)
    assert stale(100_000) == []


class JobMachine(RuleBasedStateMachine):
    """Two workers and a user act in any order."""

    owners = st.sampled_from(["one", "two"])

    def __init__(self) -> None:
        super().__init__()
        self.engine = create_engine("sqlite://")
        TableRow.metadata.create_all(self.engine)
        self.session = Session(self.engine)
        self.jobs = JobRepository(self.session, LOCAL_TENANT)
        self.job_id = add_job(self.session).id
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(repositories.jobs, "database_now", lambda _: self.now)
        self.now = NOW
        self.holder: str | None = None
        self.expires = NOW
        self.state = JobState.QUEUED
        self.percent = 0.0

    @rule(seconds=st.floats(0, 100))
    def time_passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    @rule(owner=owners)
    def acquire(self, owner: str) -> None:
        free = self.holder in (None, owner) or self.expires <= self.now
        allowed = free and not self.state.is_final
        got = self.jobs.acquire(self.job_id, owner, LEASE)
        assert (got is not None) == allowed
        if allowed:
            self.holder, self.expires = owner, self.now + timedelta(seconds=LEASE)

    @rule(owner=owners)
    def renew(self, owner: str) -> None:
        assert self.jobs.renew(self.job_id, owner, LEASE) == (self.holder == owner)
        if self.holder == owner:
            self.expires = self.now + timedelta(seconds=LEASE)

    @rule(owner=owners, state=st.sampled_from(RUNNING_ORDER[1:]), percent=st.floats(0, 100))
    def advance(self, owner: str, state: JobState, percent: float) -> None:
        held = self.jobs.advance(self.job_id, owner, progress(state, percent))
        assert held == (self.holder == owner)

    @rule(owner=owners, state=st.sampled_from([JobState.READY, JobState.FAILED]))
    def finish(self, owner: str, state: JobState) -> None:
        finished = self.jobs.finish(self.job_id, owner, state)
        assert finished == (self.holder == owner)
        if finished:
            self.holder = None

    @rule()
    def retry(self) -> None:
        retried = self.jobs.retry(self.job_id)
        assert retried == (self.state in {JobState.FAILED, JobState.CANCELLED})
        if retried:
            job = self.jobs.find(self.job_id)
            assert job is not None
            assert (job.attempt, job.error_code, job.cancel_requested) == (0, None, False)
            self.state, self.percent = JobState.QUEUED, 0.0

    @rule()
    def cancel(self) -> None:
        idle = self.holder is None or self.expires <= self.now
        was_final = self.state.is_final
        job = self.jobs.request_cancel(self.job_id)
        assert job is not None
        if not was_final:
            assert job.cancel_requested
            assert (job.state is JobState.CANCELLED) == idle
            self.holder = None if idle else self.holder

    @invariant()
    def progress_never_decreases(self) -> None:
        job = self.jobs.find(self.job_id)
        assert job is not None
        if self.state.is_final:
            assert job.state is self.state
        assert job.percent >= self.percent
        assert job.lease_owner == self.holder
        assert (job.finished_at is not None) == job.state.is_final
        self.state, self.percent = job.state, job.percent

    @invariant()
    def stale_jobs_have_no_live_lease(self) -> None:
        stale = self.jobs.stale(queued_seconds=0) != []
        waiting = self.holder is None or self.expires <= self.now
        assert stale == (waiting and not self.state.is_final)

    def teardown(self) -> None:
        self.patch.undo()
        self.session.close()
        self.engine.dispose()


TestJobMachine = JobMachine.TestCase
TestJobMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
