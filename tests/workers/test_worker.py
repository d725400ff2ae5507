"""Real worker processes on a real broker."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from deltadock.api.tasks import TaskSender
from deltadock.cli.processes import Child, free_ports
from deltadock.cli.system import keep_running, worker_command
from deltadock.compression.options import CalibrationOptions, CompressOptions, Goal
from deltadock.compression.pipeline import compress
from deltadock.storage.repositories import DeltaRepository
from deltadock.storage.tables import JobRow, JobState
from deltadock.storage.tenancy import LOCAL_TENANT
from deltadock.workers.compress import WorkerContext
from tests.waiting import wait_until

LEASE_SECONDS = "3"
NAMES = ("first", "second")
METRICS = dict(zip(NAMES, free_ports(2), strict=True))
"""The ports of the workers' metrics."""


Start = Callable[..., Child]


@pytest.fixture
def start(context: WorkerContext, broker_url: str, tmp_path: Path) -> Iterator[Start]:
    """Starts workers with a shared broker, database and blob store."""
    settings = context.settings
    environment = os.environ | {
        "DELTADOCK_HOME": str(settings.home),
        "DELTADOCK_DATABASE_URL": settings.database_url,
        "DELTADOCK_BROKER_URL": broker_url,
        "DELTADOCK_DEVICE": "cpu",
    }
    with ExitStack() as stack:

        def start(name: str, **variables: str) -> Child:
            command = [*worker_command(), "-n", name]
            log = tmp_path / f"{name}.log"
            return stack.enter_context(Child(name, command, log=log, env=environment | variables))

        yield start


@pytest.fixture
def send(submit: Callable[..., str], broker_url: str) -> Iterator[Callable[[float], str]]:
    sender = TaskSender(broker_url)

    def send(bits: float) -> str:
        job_id = submit("adamix", bits)
        sender.send_compress(job_id)
        return job_id

    yield send
    sender.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("settings", ["postgres"], indirect=True)
def test_jobs_of_stopped_and_of_killed_workers_continue(
    context: WorkerContext,
    send: Callable[[float], str],
    look: Callable[[str], JobRow],
    start: Start,
    pair: Any,
    tmp_path: Path,
) -> None:
    workers = [
        start(
            name,
            DELTADOCK_LEASE_SECONDS=LEASE_SECONDS,
            DELTADOCK_WORKER_METRICS_PORT=str(METRICS[name]),
        )
        for name in NAMES
    ]

    def owner_and_other(job_id: str) -> list[Child]:
        owner = look(job_id).lease_owner or ""
        return sorted(workers, key=lambda worker: f"-{worker.pid}-" not in owner)

    # A worker that is stopped releases its job, without error logs.
    job_id = send(1.0)
    workers[0].wait_until(lambda: look(job_id).lease_owner is not None, seconds=120)
    first, second = owner_and_other(job_id)
    first.stop()
    second.wait_until(lambda: look(job_id).state.is_final, seconds=120)
    assert (look(job_id).state, look(job_id).attempt) == (JobState.READY, 1)
    metrics = f"http://127.0.0.1:{METRICS[second.name]}/metrics"
    ready = 'deltadock_worker_jobs_total{outcome="ready"} 1.0'
    second.wait_until(lambda: ready in httpx.get(metrics).text)
    log = (tmp_path / f"{first.name}.log").read_text()
    assert "stopped" in log
    for alarm in ("Traceback", '"warning"', '"error"'):
        assert alarm not in log

    # The job of one that is killed is resumed by another, with the same bytes.
    first.restart()
    job_id = send(2.0)

    def is_compressing() -> bool:
        job = look(job_id)
        return job.state is JobState.COMPRESSING and job.stage_block >= 1

    second.wait_until(is_compressing, seconds=120)
    victim, survivor = owner_and_other(job_id)
    os.kill(victim.pid, signal.SIGKILL)
    survivor.wait_until(lambda: look(job_id).state.is_final, seconds=180)
    job = look(job_id)
    assert (job.state, job.attempt) == (JobState.READY, 2)
    with context.database.read_scope() as session:
        delta = DeltaRepository(session, LOCAL_TENANT).find(job.delta_id)
    assert delta is not None
    options = CompressOptions(
        method="adamix",
        goal=Goal("bits", 2.0),
        calibration=CalibrationOptions(tokens=2048, length=64),
    )
    alone = tmp_path / "alone.safetensors"
    compress(pair.base, pair.finetuned, alone, options, calibration=pair.calibration)
    assert delta.artifact_digest == context.blobs.put_file(alone)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_the_job_of_a_killed_worker_goes_on_at_once_before_one_that_waits(
    context: WorkerContext,
    send: Callable[[float], str],
    look: Callable[[str], JobRow],
    start: Start,
) -> None:
    worker = start("worker", DELTADOCK_LEASE_SECONDS="3600")
    began, waits = send(1.0), send(2.0)
    worker.wait_until(lambda: look(began).lease_owner is not None, seconds=120)
    os.kill(worker.pid, signal.SIGKILL)
    stopping = threading.Event()
    supervising = threading.Thread(
        target=keep_running,
        args=([worker], stopping, Console(file=StringIO()), context.settings),
    )
    supervising.start()
    try:
        wait_until(lambda: look(waits).state.is_final, seconds=240)
    finally:
        stopping.set()
        supervising.join()
    first, second = look(began), look(waits)
    assert (first.state, first.attempt, second.attempt) == (JobState.READY, 2, 1)
    assert first.finished_at is not None
    assert second.started_at is not None
    assert first.finished_at <= second.started_at
