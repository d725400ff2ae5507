"""Shared fixtures: one real server of each kind per session, with an empty database per test."""

import functools
import gc
import os
import ssl
import tempfile
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import psycopg
import pytest
import redis
import structlog
from hypothesis import settings
from psycopg import sql
from sqlalchemy import make_url
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from deltadock.cli import services
from deltadock.storage.database import migrate

# In CI, Hypothesis examples are deterministic; elsewhere they are new in each run.
# No deadlines: run times vary on busy machines.
settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("here", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "here")

# No test speaks TLS, and every HTTP client loads the certificates of the world's authorities.
ssl.create_default_context = functools.cache(ssl.create_default_context)

# As the processes log: structlog's default draws the local variables of a traceback, for seconds.
structlog.configure(
    [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.dev.ConsoleRenderer(
            colors=False, exception_formatter=structlog.dev.plain_traceback
        ),
    ]
)

SLOW = (
    "test_wheel.py",
    "system",
    "compatibility",
    "kernels/test_interpreter.py",
    "benchmarks",
    "workers",
    "compression/test_optimix.py",
    "inference/test_fleet.py",
    "cli/test_up.py",
    "storage/test_models.py",
    "compression/test_preview.py",
    "kernels/svd_delta/test_compile.py",
    "compression/test_review.py",
    "compression/test_pipeline.py",
    "compression/test_distillation.py",
    "compression/model/test_families.py",
    "inference/test_isolation.py",
    "inference/test_imports.py",
    "inference/model/test_equivalence.py",
    "inference/model/test_added_tokens.py",
    "api/test_openapi.py",
    "api/test_production.py",
    "cli/test_verbs.py",
    "cli/test_records.py",
    "client",
    "cli/test_system.py",
    "cli/test_services.py",
    "migrations",
    "storage/test_jobs.py",
    "storage/test_collection.py",
    "artifacts/test_attacks.py",
    "artifacts/test_reader.py",
    "api/generation/test_generation.py",
    "api/test_nodes.py",
    "api/deltas/test_deltas.py",
    "api/access/test_access.py",
    "api/test_traces.py",
    "api/test_audit.py",
    "storage/test_backup.py",
    "api/test_limits.py",
    "api/test_concurrency.py",
    "storage/test_blobs.py",
    "storage/test_blob_faults.py",
    "storage/test_blob_parts.py",
    "api/test_process.py",
    "api/uploads/test_upload_parts.py",
    "api/uploads/test_upload_sources.py",
    "api/uploads/test_upload_states.py",
    "api/uploads/test_client_uploads.py",
    "inference/model/test_weight_deltas.py",
    "inference/engine/test_model_runner.py",
    "inference/http/test_hot_delta.py",
)
"""Slow files and folders, slowest first; `make unit` skips them."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect no garbage while tests are collected; what that made is kept out of later
    collections, which took 6 % of the run.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_sessionfinish() -> None:
    """Let exiting free it all: libraries complain of what stays."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests and run them first, so that no process ends with a long one."""

    @functools.cache
    def rank(file: Path) -> int:
        path = file.relative_to(Path(__file__).parent)
        names = [path.as_posix(), *(parent.as_posix() for parent in path.parents)]
        return next((number for number, name in enumerate(SLOW) if name in names), len(SLOW))

    items.sort(key=lambda item: rank(item.path))
    for item in items:
        if rank(item.path) < len(SLOW):
            item.add_marker(pytest.mark.slow)


class OneProcessPerFile(LoadFileScheduling):
    """xdist's `--dist loadfile`, with the files of tests/system, which share systems, as one."""

    def _split_scope(self, nodeid: str) -> str:
        scope = super()._split_scope(nodeid)
        return "tests/system" if scope.startswith("tests/system/") else scope


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneProcessPerFile:
    """Run the tests of a file in one process: they share module and session fixtures."""
    return OneProcessPerFile(config, log)


@pytest.fixture(scope="session")
def services_folder() -> Iterator[Path]:
    """A folder that Postgres can reach even when root runs the tests; pytest's own is private."""
    with tempfile.TemporaryDirectory(prefix="deltadock-tests-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        yield folder


@pytest.fixture(scope="session")
def postgres_service(services_folder: Path) -> Iterator[services.Service]:
    with services.postgres(services_folder / "postgres") as service:
        yield service


@pytest.fixture(scope="session")
def valkey_service(services_folder: Path) -> Iterator[services.Service]:
    with services.valkey(services_folder / "valkey") as service:
        yield service


@pytest.fixture(scope="session")
def seaweedfs_service(services_folder: Path) -> Iterator[services.Service]:
    with services.seaweedfs(services_folder / "seaweedfs") as service:
        yield service


@pytest.fixture(scope="session")
def postgres_url(postgres_service: services.Service) -> str:
    """SQLAlchemy URL of a running Postgres; for an empty database use `postgres_database`."""
    return postgres_service.settings["database_url"]


@pytest.fixture(scope="session")
def redis_url(valkey_service: services.Service) -> str:
    """URL of a running Valkey; for an empty one use `broker_url`."""
    return valkey_service.settings["broker_url"]


@pytest.fixture(scope="session")
def s3_settings(seaweedfs_service: services.Service) -> dict[str, str]:
    """Fields of `Settings` for a running S3 server; for an empty bucket use `s3_bucket`."""
    return seaweedfs_service.settings


@contextmanager
def new_database(postgres_url: str, template: str = "template1") -> Iterator[str]:
    """SQLAlchemy URL of a new database, a copy of `template`, while the context lasts."""
    url = make_url(postgres_url)
    name = f"test_{uuid.uuid4().hex}"
    administration = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(administration, autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
        try:
            yield url.set(database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(
                sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))
            )


@pytest.fixture
def postgres_database(postgres_url: str) -> Iterator[str]:
    """SQLAlchemy URL of an empty database for this test alone."""
    with new_database(postgres_url) as url:
        yield url


@pytest.fixture(scope="session")
def migrated_template(postgres_url: str) -> Iterator[str]:
    """Name of a migrated Postgres database to copy: the migrations run once."""
    with new_database(postgres_url) as url:
        migrate(url)
        yield make_url(url).database or ""


@pytest.fixture
def migrated_postgres(postgres_url: str, migrated_template: str) -> Iterator[str]:
    """As `postgres_database`, migrated."""
    with new_database(postgres_url, migrated_template) as url:
        yield url


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite database to copy into a home: the migrations run once."""
    path = tmp_path_factory.mktemp("migrated") / "deltadock.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture
def broker_url(redis_url: str) -> str:
    """URL of the Valkey server, emptied for this test."""
    with redis.Redis.from_url(redis_url) as connection:
        connection.flushall()
    return redis_url


@pytest.fixture
def s3_bucket(s3_settings: dict[str, str]) -> dict[str, str]:
    """`s3_settings` with an empty bucket for this test alone."""
    bucket = f"test-{uuid.uuid4().hex}"
    client = boto3.client(
        "s3",
        endpoint_url=s3_settings["s3_endpoint_url"],
        region_name="us-east-1",
        aws_access_key_id=s3_settings["s3_access_key_id"],
        aws_secret_access_key=s3_settings["s3_secret_access_key"],
    )
    client.create_bucket(Bucket=bucket)
    client.close()
    return s3_settings | {"s3_bucket": bucket}
