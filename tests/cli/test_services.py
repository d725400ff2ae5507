"""The servers start, answer, persist their data and leave no process behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import boto3
import psutil
import psycopg
import pytest
import redis
from sqlalchemy import create_engine, make_url, text

from deltadock.cli import processes, services
from deltadock.cli.processes import Child, free_ports, port_is_free
from deltadock.errors import Unavailable
from tests.waiting import wait_until


def test_a_large_log_is_put_aside_and_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LOG_BYTES", 100)
    log, aside, go = tmp_path / "a.log", tmp_path / "a.log.1", tmp_path / "go"
    command = ["sh", "-c", f"seq 50; while [ ! -e {go} ]; do sleep 0.05; done; echo later"]
    with Child("chatty", command, log=log) as child:
        wait_until(lambda: log.read_text().endswith("50\n"))
        child.rotate_log()
        assert aside.read_text().splitlines()[-1] == "50"
        go.touch()
        wait_until(lambda: log.read_text() == "later\n")
        child.rotate_log()
        assert log.read_text() == "later\n", "it is small again"


def test_valkey_persists_and_stops_after_an_exception(tmp_path: Path) -> None:
    ended = []

    def set_and_fail() -> None:
        with services.valkey(tmp_path) as service, _redis(service) as connection:
            ended.append(service)
            connection.set("kept", "yes")
            connection.waitaof(1, 0, 5_000)
            raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        set_and_fail()
    assert ended[0].child.poll() == 0
    with services.valkey(tmp_path) as service, _redis(service) as connection:
        assert connection.get("kept") == b"yes"


def _redis(service: services.Service) -> redis.Redis:
    return redis.Redis.from_url(service.settings["broker_url"])


def test_valkey_listens_on_the_requested_port(tmp_path: Path) -> None:
    [port] = free_ports(1)
    with services.valkey(tmp_path, port) as service:
        assert service.settings == {"broker_url": f"redis://127.0.0.1:{port}/0"}
    assert port_is_free(port)


def test_postgres_never_runs_as_root(postgres_database: str) -> None:
    engine = create_engine(postgres_database)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE t (n int)"))
        connection.execute(text("INSERT INTO t VALUES (1), (2)"))
        locked = connection.scalar(text("SELECT n FROM t LIMIT 1 FOR UPDATE SKIP LOCKED"))
        pid = connection.scalar(text("SELECT pg_backend_pid()"))
        user = psutil.Process(pid).uids().real
    engine.dispose()
    assert locked == 1
    assert user != 0


def test_postgres_refuses_a_wrong_password(postgres_url: str) -> None:
    url = make_url(postgres_url).set(drivername="postgresql", password="guess")
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(url.render_as_string(hide_password=False))


def test_postgres_persists(services_folder: Path) -> None:
    folder = services_folder / "again"
    for statement in ("CREATE TABLE kept (n int)", "SELECT n FROM kept"):
        with services.postgres(folder) as service:
            engine = create_engine(service.settings["database_url"])
            with engine.begin() as connection:
                connection.execute(text(statement))
            engine.dispose()
        assert service.child.poll() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root drops privileges")
def test_a_folder_that_nobody_cannot_access_is_refused(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    with pytest.raises(Unavailable, match="cannot access"), services.postgres(private / "data"):
        pass


def test_s3_supports_ranges_and_conditional_writes(s3_bucket: dict[str, str]) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=s3_bucket["s3_endpoint_url"],
        region_name="us-east-1",
        aws_access_key_id=s3_bucket["s3_access_key_id"],
        aws_secret_access_key=s3_bucket["s3_secret_access_key"],
    )
    bucket = s3_bucket["s3_bucket"]
    client.put_object(Bucket=bucket, Key="a", Body=b"0123456789")
    part = client.get_object(Bucket=bucket, Key="a", Range="bytes=2-4")["Body"]
    assert part.read() == b"234"
    part.close()
    with pytest.raises(client.exceptions.ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=bucket, Key="a", Body=b"", IfNoneMatch="*")
    client.close()


def test_a_failed_child_is_reported_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    with (
        Child("broken", command, log=tmp_path / "broken.log") as child,
        pytest.raises(Unavailable, match="broken exited with status 1") as caught,
    ):
        child.wait_until(lambda: False)
    assert "no such thing" in str(caught.value.details["log_tail"])


def test_a_child_restarts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Child("echo", ["echo", "started"], log=log) as child:
        child.wait_until(lambda: child.poll() == 0)
        child.restart()
        child.wait_until(lambda: child.poll() == 0)
    assert log.read_text() == "started\n" * 2


def test_stopping_kills_grandchildren_and_processes_that_ignore_sigterm(tmp_path: Path) -> None:
    script = """
        import signal, subprocess, sys
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(grandchild.pid, flush=True)
        grandchild.wait()
    """
    log = tmp_path / "stubborn.log"
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with Child("stubborn", command, log=log, grace=0.1) as child:
        child.wait_until(lambda: log.read_text().endswith("\n"))
    assert child.poll() == -signal.SIGKILL
    assert _ends(int(log.read_text()))


def test_children_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = """
        import sys, time
        from pathlib import Path
        from deltadock.cli.processes import Child
        with Child("sleeper", ["sleep", "600"], log=Path(sys.argv[1])) as child:
            print(child.pid, flush=True)
            time.sleep(600)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path / "log"], stdout=subprocess.PIPE
    )
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    assert _ends(child)


def _ends(pid: int, seconds: float = 20.0) -> bool:
    """Whether the process exits in time; a zombie counts as exited."""
    try:
        process = psutil.Process(pid)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        return True
    return False
