"""`deltadock doctor`: check a set-up, and say what is wrong and what to do."""

import shutil
import stat
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import typer

from deltadock.cli.outcome import FAILED
from deltadock.cli.output import AsJson, output, print_json, say
from deltadock.cli.server import Url, connect
from deltadock.errors import DeltadockError, Forbidden, InvalidInput
from deltadock.version import DOCS, __version__
from deltadock.words import counted, size

if TYPE_CHECKING:
    from deltadock.client.blocking import Client

MARKS: Final = {"ok": "✓", "warning": "!", "problem": "✗"}
LEAST_FREE: Final = 2_000_000_000
"""Bytes on the home's disk below which a compression may fail."""
FULL: Final = 16_000_000
"""Bytes below which the database and the broker may write nothing."""
RUNNING: Final = ("validating", "calibrating", "compressing", "assembling", "verifying")
WAITING: Final = timedelta(minutes=2)
"""A job that waits for longer while none runs has no worker."""


State = Literal["ok", "warning", "problem"]


class Finding(NamedTuple):
    """What one check found."""

    check: str
    state: State
    text: str


def doctor(as_json: AsJson = False, url: Url = None) -> None:
    """Check this machine's set-up and the server; exits with 1 if something is wrong."""
    findings = []
    for finding in _findings(url):
        findings.append(finding)
        if not as_json:
            output.print(f"{MARKS[finding.state]} {finding.check}: {finding.text}", soft_wrap=True)
    if as_json:
        print_json([finding._asdict() for finding in findings])
    if any(finding.state == "problem" for finding in findings):
        say(f"When something fails: {DOCS}/operate/jobs.md#when-something-fails")
        raise typer.Exit(FAILED)


def _findings(url: str | None) -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("version", "ok", f"deltadock {__version__}, Python {python}")
    if find_spec("torch") is None:
        yield Finding(
            "torch",
            "warning",
            "not installed; offline commands, workers and nodes need `deltadock[torch]`",
        )
    from deltadock.settings import read_settings

    try:
        home = read_settings().home
    except InvalidInput as error:
        yield Finding("settings", "problem", error.message)
        return
    yield from _home(home)
    yield from _server(url)


def _home(home: Path) -> Iterator[Finding]:
    from deltadock.storage.api_keys import local_key_path

    if not home.exists():
        yield Finding("home", "ok", f"{home} is not there yet; `deltadock up` makes it")
        return
    if not home.is_dir():
        yield Finding("home", "problem", f"{home} is not a folder; set DELTADOCK_HOME")
        return
    free = shutil.disk_usage(home).free
    state: State = "ok" if free >= LEAST_FREE else "warning" if free >= FULL else "problem"
    yield Finding("home", state, f"{home}, {size(free)} free")
    key = local_key_path(home)
    if key.exists() and stat.S_IMODE(key.stat().st_mode) & 0o077:
        yield Finding("key file", "problem", f"others can read {key}; chmod 600 {key}")


_STATES: Final = {"ok": "ok", "full": "its disk is full"}


def _server(url: str | None) -> Iterator[Finding]:
    import httpx

    from deltadock.client.connection import check_connection, find_connection

    found = find_connection(url)
    try:
        check_connection(found)
        answer = httpx.get(f"{found.url}/readyz", timeout=10.0)
        checks: dict[str, str] = answer.json()["checks"]
    except InvalidInput as error:
        yield Finding("server", "problem", error.message)
        return
    except httpx.HTTPError as error:
        yield Finding(
            "server",
            "problem",
            f"{found.url} ({found.url_from}) does not answer: {error or type(error).__name__}. "
            "`deltadock up` starts one here; --url or `deltadock login` names another",
        )
        return
    except (ValueError, KeyError, TypeError):
        yield Finding("server", "problem", f"{found.url} ({found.url_from}) is no Deltadock")
        return
    yield Finding("server", "ok", f"{found.url} ({found.url_from})")
    for part, state in checks.items():
        if part != "node":
            ok = state == "ok"
            text = _STATES.get(state, "does not answer; see the api's log")
            yield Finding(part, "ok" if ok else "problem", text)
    try:
        with connect(url) as client:
            next(client.bases(), None)
            yield Finding("key", "ok", f"accepted, from {found.key_from}")
            if checks.get("database") == "ok":  # otherwise the server looks for no node
                yield from _nodes(client, checks.get("node") == "ok")
            yield from _work(client)
    except Forbidden:  # it may be a key to ask models with, which is all that its owner needs
        text = f"accepted, from {found.key_from}; without the scope read, nothing more is looked at"
        yield Finding("key", "ok", text)
    except DeltadockError as error:
        yield Finding("key", "problem", " ".join(error.message.split()))


def _nodes(client: "Client", has_node: bool) -> Iterator[Finding]:
    """Whether answers are given."""
    if not has_node:
        yield Finding(
            "nodes", "problem", "no node runs, so nothing answers; start one: deltadock node"
        )
    else:
        nodes = client.nodes()
        served = {node.base for node in nodes}
        bases = islice(client.bases(), 200)
        missing = [base.name for base in bases if base.checkpoint.digest not in served]
        adopts = any(node.base is None or node.adopts for node in nodes)
        text = _doing(len(nodes), "node", "run")
        if missing and not adopts:
            text += f"; none serves {', '.join(missing)}: deltadock node --base DIR --api URL"
        yield Finding("nodes", "warning" if missing and not adopts else "ok", text)


def _work(client: "Client") -> Iterator[Finding]:
    """Whether there is a base, and jobs are worked on."""
    if next(client.bases(), None) is None:
        yield Finding("bases", "warning", "there is none yet: deltadock bases add DIR")
    queued = list(islice(client.jobs(state=["queued"]), 200))
    running = next(client.jobs(state=RUNNING), None)
    oldest = min((job.updated_at for job in queued), default=None)
    if oldest is not None and running is None and datetime.now(UTC) - oldest > WAITING:
        yield Finding(
            "worker",
            "problem",
            f"{_doing(len(queued), 'job', 'wait')} and none runs; is a worker running?",
        )
    elif queued or running is not None:
        yield Finding("worker", "ok", f"{'busy' if running else 'about to start'}; "
                      f"{_doing(len(queued), 'job', 'wait')}")  # fmt: skip
    failed = sum(1 for _ in islice(client.jobs(state=["failed"]), 200))
    if failed:
        yield Finding("jobs", "warning", f"{failed} failed: deltadock jobs --state failed")


def _doing(number: int, noun: str, verb: str) -> str:
    return f"{counted(number, noun)} {verb}{'s' if number == 1 else ''}"
