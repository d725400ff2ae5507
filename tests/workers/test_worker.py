"""Real worker processes on a real broker."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from celery import Celery

from deltadock.cli.processes import Child, free_ports
from deltadock.compression.options import CalibrationOptions, CompressOptions
from deltadock.compression.pipeline import compress
from deltadock.storage.models import JobRow, JobState
from deltadock.storage.repositories import DeltaRepository
from deltadock.storage.tenancy import LOCAL_TENANT
from deltadock.workers.compress import WorkerContext

LEASE_SECONDS = "3"
NAMES = ("first", "second")
METRICS = dict(zip(NAMES, free_ports(2), strict=True))
"""The ports of the workers' metrics."""


@pytest.fixture
def workers(context: WorkerContext, broker_url: str, tmp_path: Path) -> Iterator[list[Child]]:
    """Two workers with a shared broker, database and blob store."""
    settings = context.settings
    environment = os.environ | {
        "DELTADOCK_HOME": str(settings.home),
        "DELTADOCK_DATABASE_URL": settings.database_url,
        "DELTADOCK_BROKER_URL": broker_url,
        "DELTADOCK_LEASE_SECONDS": LEASE_SECONDS,
        "DELTADOCK_DEVICE": "cpu",
    }
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "deltadock.workers.app",
        "worker",
        "-P",
        "solo",
    ]
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                Child(
                    name,
                    [*command, "-Q", "gpu,default", "-n", name],
                    log=tmp_path / f"{name}.log",
                    env=environment | {"DELTADOCK_WORKER_METRICS_PORT": str(METRICS[name])},
                )
            )
            for name in NAMES
        ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("settings", ["postgres"], indirect=True)
def test_jobs_of_stopped_and_of_killed_workers_continue(
    context: WorkerContext,
    submit: Callable[..., str],
    look: Callable[[str], JobRow],
    workers: list[Child],
    broker_url: str,
    pair: Any,
    tmp_path: Path,
) -> None:
    def send(bits: float) -> str:
        job_id = submit("adamix", bits)
        with Celery(broker=broker_url, set_as_current=False) as sender:
            sender.send_task("deltadock.compress", args=[job_id], queue="gpu")
        return job_id

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
        method="adamix", bits=2.0, calibration=CalibrationOptions(tokens=2048, length=64)
    )
    alone = tmp_path / "alone.safetensors"
    compress(pair.base, pair.finetuned, alone, options, calibration=pair.calibration)
    assert delta.artifact_digest == context.blobs.put_file(alone)
