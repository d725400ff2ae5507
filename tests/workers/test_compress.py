"""Outcomes of a compression job, in this process."""

import json
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltadock.artifacts.folder import scan_folder
from deltadock.artifacts.reader import Artifact
from deltadock.cli.processes import free_ports
from deltadock.compression import pipeline
from deltadock.compression.options import CompressOptions, Goal, Source
from deltadock.compression.scratch import Scratch
from deltadock.errors import Cancelled, InvalidInput
from deltadock.settings import Settings
from deltadock.storage.blobs import make_blob_store
from deltadock.storage.repositories import DeltaRepository, JobRepository, WebhookRepository
from deltadock.storage.repositories.blobs import BlobRepository
from deltadock.storage.tables import DeliveryState, JobRow, JobState, WebhookEvent
from deltadock.storage.tenancy import LOCAL_TENANT
from deltadock.workers import compress as module
from deltadock.workers.compress import (
    MAX_ATTEMPTS,
    Outcome,
    WorkerContext,
)
from deltadock.workers.lease import STOPPING
from tests.workers.conftest import job_files, take_and_compress

Submit = Callable[..., str]
Look = Callable[[str], JobRow]
SetJob = Callable[..., None]


@pytest.fixture
def during(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Runs an action while the real pipeline compresses its first block."""

    def during(action: Callable[[], None]) -> None:
        def compress(*arguments: object, progress: Callable[..., None], **named: object) -> object:
            def observed(step: pipeline.Progress) -> None:
                if step.stage == "compressing" and step.block == 1:
                    action()
                progress(step)

            return pipeline.compress(*arguments, progress=observed, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(module, "compress", compress)

    return during


@pytest.fixture
def stopping() -> Iterator[Callable[[], None]]:
    """Set the flag that SIGTERM sets."""
    yield STOPPING.set
    STOPPING.clear()


def assert_nothing_left(context: WorkerContext, job_id: str) -> None:
    assert job_files(context) == []
    assert not (context.settings.blob_folder / "work" / job_id).exists()


def test_a_job_becomes_a_ready_delta(context: WorkerContext, submit: Submit, look: Look) -> None:
    job_id = submit()
    with context.database.session_scope() as session:
        hook = WebhookRepository(session, LOCAL_TENANT).add("https://a.test/", [*WebhookEvent], "")
    assert take_and_compress(context) is Outcome.READY
    job = look(job_id)
    with context.database.read_scope() as session:
        deliveries = WebhookRepository(session, LOCAL_TENANT).deliveries(hook, limit=9)
    assert {each.event for each in deliveries} == {
        WebhookEvent.DELTA_READY, WebhookEvent.ALIAS_MOVED
    }  # fmt: skip
    for each in deliveries:
        assert each.state is DeliveryState.PENDING
        assert json.loads(each.body)["data"]["delta"] == job.delta_id
    assert (job.state, job.percent, job.attempt) == (JobState.READY, 100.0, 1)
    assert job.lease_owner is None
    with context.database.read_scope() as session:
        delta = DeltaRepository(session, LOCAL_TENANT).find(job.delta_id)
        assert delta is not None
        report = DeltaRepository(session, LOCAL_TENANT).report(delta.id)
    assert delta.artifact_digest is not None
    assert report is not None
    assert delta.artifact_bytes == context.blobs.size(delta.artifact_digest)
    assert report["kl"] == 0.0
    with Artifact(context.settings.blob_folder / "blobs" / delta.artifact_digest) as artifact:
        assert artifact.manifest["base_digest"] == report["base_digest"]
    assert_nothing_left(context, job_id)


def test_what_memory_does_not_hold_is_with_the_attempts_files(
    context: WorkerContext, submit: Submit, during: Callable[[Callable[[], None]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("deltadock.compression.residence.Scratch", partial(Scratch, 0))
    found: set[Path] = set()

    def look_around() -> None:
        attempts = context.settings.cache_folder / "attempts"
        found.update(attempts.glob("*/deltadock-*/*.safetensors"))

    during(look_around)
    job_id = submit("adamix", 1.0, sampled=True)
    assert take_and_compress(context) is Outcome.READY
    assert found
    assert_nothing_left(context, job_id)


def test_the_row_contains_the_calibration_sources(
    context: WorkerContext, submit: Submit, look: Look
) -> None:
    job_id = submit("adamix", 1.0, sampled=True)
    assert take_and_compress(context) is Outcome.READY
    job = look(job_id)
    assert job.state is JobState.READY, job.error_message
    with context.database.read_scope() as session:
        delta = DeltaRepository(session, LOCAL_TENANT).find(job.delta_id)
        assert delta is not None
        report = DeltaRepository(session, LOCAL_TENANT).report(delta.id)
    assert report is not None
    assert report["calibration"]["tokens"] == 2048


@pytest.mark.parametrize("suffix", [".jsonl", None])
def test_a_calibration_text_is_read_as_it_was_asked_for(
    context: WorkerContext,
    submit: Submit,
    look: Look,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str | None,
) -> None:
    job_id = submit("adamix", 1.0)
    with context.database.session_scope() as session:
        delta = DeltaRepository(session, LOCAL_TENANT).find(look(job_id).delta_id)
        assert delta is not None
        calibration = delta.options["calibration"]
        sources = [{**source, "suffix": suffix} for source in calibration["sources"]]
        delta.options = {**delta.options, "calibration": {**calibration, "sources": sources}}
    asked: list[str] = []

    def compress(*_: object, calibration: list[Source], **__: object) -> None:
        asked.extend(source.path.suffix for source in calibration if source.path)
        raise Cancelled("seen")

    monkeypatch.setattr(module, "compress", compress)
    take_and_compress(context)
    assert asked == [suffix or ".txt"]


@pytest.mark.parametrize(
    ("kind", "value"),
    [("target_bytes", 250_000.0), ("ratio", 5.5), ("max_kl", 0.25), ("min_agreement", 0.875)],
)
def test_the_row_contains_the_goal(
    context: WorkerContext,
    submit: Submit,
    look: Look,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    value: float,
) -> None:
    job_id = submit("adamix", 1.0)
    with context.database.session_scope() as session:
        delta = DeltaRepository(session, LOCAL_TENANT).find(look(job_id).delta_id)
        assert delta is not None
        delta.options = {**delta.options, "goal": {"kind": kind, "value": value}}
        delta.bits = None
    asked: list[CompressOptions] = []

    def compress(*arguments: object, **_: object) -> None:
        asked.extend(each for each in arguments if isinstance(each, CompressOptions))
        raise Cancelled("seen")

    monkeypatch.setattr(module, "compress", compress)
    take_and_compress(context)
    (options,) = asked
    assert options.goal == Goal(kind, value)
    assert (options.calibration.tokens, options.calibration.length) == (2048, 64)


def test_a_redelivered_task_does_nothing(
    context: WorkerContext, submit: Submit, look: Look, set_job: SetJob
) -> None:
    job_id = submit()
    with context.database.session_scope() as session:
        assert JobRepository(session, LOCAL_TENANT).acquire(job_id, "another", 60.0)
    before = look(job_id)
    assert take_and_compress(context) is None
    assert (look(job_id).lease_owner, look(job_id).attempt) == ("another", before.attempt)

    set_job(job_id, lease_expires_at=datetime.now(UTC) - timedelta(seconds=1))
    assert take_and_compress(context) is Outcome.READY
    done = look(job_id)
    assert take_and_compress(context) is None
    assert look(job_id).updated_at == done.updated_at


def test_cancelling_during_compression_stores_nothing(
    context: WorkerContext,
    submit: Submit,
    look: Look,
    during: Callable[[Callable[[], None]], None],
) -> None:
    job_id = submit("adamix", 1.0)

    def cancel() -> None:
        with context.database.session_scope() as session:
            JobRepository(session, LOCAL_TENANT).request_cancel(job_id)

    during(cancel)
    blobs = set((context.settings.blob_folder / "blobs").iterdir())
    assert take_and_compress(context) is Outcome.FINISHED
    job = look(job_id)
    assert (job.state, job.error_code) == (JobState.CANCELLED, "cancelled")
    assert set((context.settings.blob_folder / "blobs").iterdir()) == blobs
    assert job_files(context) == []


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_a_retried_job_keeps_its_finished_blocks_and_its_log(
    context: WorkerContext,
    submit: Submit,
    look: Look,
    during: Callable[[Callable[[], None]], None],
) -> None:
    job_id = submit("adamix", 1.0)

    def fail() -> None:
        raise InvalidInput("broken")

    during(fail)
    assert take_and_compress(context) is Outcome.FINISHED
    saved = list((context.settings.blob_folder / "work" / job_id).rglob("0"))
    assert saved, "the first block was saved"
    written = saved[0].stat().st_mtime_ns
    with context.database.session_scope() as session:
        assert JobRepository(session, LOCAL_TENANT).retry(job_id)
    kept: list[int] = []
    during(lambda: kept.append(saved[0].stat().st_mtime_ns))
    assert take_and_compress(context) is Outcome.READY
    assert set(kept) == {written}, "the block was read, not computed again"
    with context.database.read_scope() as session:
        lines = [
            line.message
            for line in JobRepository(session, LOCAL_TENANT).log(job_id, after=0, limit=1000)
        ]
    events = [line.partition(" on ")[0] for line in lines if not line[0].islower()]
    assert events == [
        "Attempt 1 starts", "Failed (invalid_input): broken", "Queued again",
        "Attempt 1 starts", "Ready.",
    ]  # fmt: skip
    assert any(line.startswith("compressing: block 1 of") for line in lines)
    assert_nothing_left(context, job_id)


def test_deleting_the_delta_cancels_its_job(
    context: WorkerContext, submit: Submit, look: Look, during: Callable[[Callable[[], None]], None]
) -> None:
    job_id = submit("adamix", 1.0)

    def delete() -> None:
        with context.database.session_scope() as session:
            delta = DeltaRepository(session, LOCAL_TENANT).find(look(job_id).delta_id)
            if delta is not None:
                JobRepository(session, LOCAL_TENANT).request_cancel(job_id)
                DeltaRepository(session, LOCAL_TENANT).delete(delta)

    during(delete)
    assert take_and_compress(context) is Outcome.FINISHED
    assert look(job_id).state is JobState.CANCELLED


def test_a_worker_without_its_lease_writes_nothing(
    context: WorkerContext,
    submit: Submit,
    look: Look,
    set_job: SetJob,
    during: Callable[[Callable[[], None]], None],
) -> None:
    job_id = submit("adamix", 1.0)
    during(lambda: set_job(job_id, lease_owner="successor", message="mine"))
    assert take_and_compress(context) is Outcome.SKIPPED
    job = look(job_id)
    assert (job.state, job.lease_owner, job.message) == (
        JobState.COMPRESSING,
        "successor",
        "mine",
    )


def test_a_stopping_worker_releases_the_job(
    context: WorkerContext,
    submit: Submit,
    look: Look,
    during: Callable[[Callable[[], None]], None],
    stopping: Callable[[], None],
) -> None:
    job_id = submit("adamix", 1.0)
    during(stopping)
    assert take_and_compress(context) is Outcome.STOPPED
    job = look(job_id)
    assert (job.state, job.lease_owner, job.attempt) == (JobState.COMPRESSING, None, 0)
    STOPPING.clear()
    during(lambda: None)
    saved = list((context.settings.blob_folder / "work" / job_id).rglob("0"))
    assert saved, "the first block was saved"
    assert take_and_compress(context) is Outcome.READY
    assert look(job_id).state is JobState.READY
    assert_nothing_left(context, job_id)


def test_bad_input_fails_the_job_with_a_stable_code(
    context: WorkerContext, submit: Submit, look: Look, pair: Any, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pair.finetuned, broken)
    weights = load_file(broken / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    job_id = submit(finetuned=broken)
    assert take_and_compress(context) is Outcome.FINISHED
    job = look(job_id)
    assert (job.state, job.error_code) == (JobState.FAILED, "non_finite_weights")
    assert "NaN" in (job.error_message or "")
    assert_nothing_left(context, job_id)


def test_a_damaged_blob_fails_the_job(
    context: WorkerContext, submit: Submit, look: Look, pair: Any
) -> None:
    job_id = submit()
    manifest = scan_folder(pair.finetuned)
    digest = next(file.sha256 for file in manifest.files if file.path == "model.safetensors")
    blob = context.settings.blob_folder / "blobs" / digest
    damaged = bytearray(blob.read_bytes())
    damaged[-1] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(damaged)
    assert take_and_compress(context) is Outcome.FINISHED
    assert (look(job_id).state, look(job_id).error_code) == (JobState.FAILED, "damaged_blob")
    with context.database.read_scope() as session:
        assert BlobRepository(session).damaged([digest]) == {digest}, "it is asked for again"


def test_an_unavailable_store_is_retried_up_to_the_limit(
    context: WorkerContext, submit: Submit, look: Look, set_job: SetJob
) -> None:
    job_id = submit()
    unreachable = Settings.model_validate(
        context.settings.model_dump()
        | {"blob_store": "s3", "s3_endpoint_url": f"http://127.0.0.1:{free_ports(1)[0]}"}
        | {"s3_access_key_id": "key", "s3_secret_access_key": "secret"}
    )
    without_blobs = WorkerContext(unreachable, context.database, make_blob_store(unreachable))
    assert take_and_compress(without_blobs) is Outcome.LATER
    assert take_and_compress(context) is None, "it waits for what caused the error to end"
    set_job(job_id, lease_expires_at=datetime.now(UTC))
    with context.database.read_scope() as session:
        assert JobRepository(session, LOCAL_TENANT).stale() == [job_id]
    set_job(job_id, attempt=MAX_ATTEMPTS - 1)
    take_and_compress(without_blobs)
    assert (look(job_id).state, look(job_id).error_code) == (JobState.FAILED, "unavailable")


def test_a_job_that_kills_its_workers_fails(
    context: WorkerContext, submit: Submit, look: Look, set_job: SetJob
) -> None:
    job_id = submit()
    set_job(job_id, attempt=MAX_ATTEMPTS)
    with context.database.session_scope() as session:
        hook = WebhookRepository(session, LOCAL_TENANT).add("https://a.test/", [*WebhookEvent], "")
    assert take_and_compress(context) is Outcome.FINISHED
    with context.database.read_scope() as session:
        (told,) = WebhookRepository(session, LOCAL_TENANT).deliveries(hook, limit=9)
    assert json.loads(told.body)["data"]["error"]["code"] == "worker_lost"
    assert (look(job_id).state, look(job_id).error_code) == (JobState.FAILED, "worker_lost")


def test_an_unexpected_exception_is_logged_but_not_disclosed(
    context: WorkerContext, submit: Submit, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(module, "compress", fail)
    job_id = submit()
    assert take_and_compress(context) is Outcome.FINISHED
    job = look(job_id)
    assert (job.state, job.error_code) == (JobState.FAILED, "internal_error")
    assert "secret" not in (job.error_message or "")
