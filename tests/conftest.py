"""Fixtures for every folder: real servers, one of each kind a session, with fresh room a test."""

import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import psycopg
import pytest
import redis
from hypothesis import settings
from psycopg import sql
from sqlalchemy import make_url

from deltadock.cli import services

# A check of a change answers the same when it is asked twice; elsewhere examples are new each time.
# How long one takes is not judged: machines are slow when they are busy.
settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("here", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "here")


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
    """SQLAlchemy URL of a running Postgres; for a database of your own take `postgres_database`."""
    return postgres_service.settings["database_url"]


@pytest.fixture(scope="session")
def redis_url(valkey_service: services.Service) -> str:
    """URL of a running Valkey; for an empty one take `broker_url`."""
    return valkey_service.settings["broker_url"]


@pytest.fixture(scope="session")
def s3_settings(seaweedfs_service: services.Service) -> dict[str, str]:
    """Fields of `Settings` for a running S3 server; for a bucket of your own take `s3_bucket`."""
    return seaweedfs_service.settings


@pytest.fixture
def postgres_database(postgres_url: str) -> Iterator[str]:
    """SQLAlchemy URL of an empty database for this test alone."""
    url = make_url(postgres_url)
    name = f"test_{uuid.uuid4().hex}"
    administration = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(administration, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            yield url.set(database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(
                sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))
            )


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
