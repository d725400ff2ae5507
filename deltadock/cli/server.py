"""The server that the commands talk to: its options, and a client of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltadock.cli.output import say
from deltadock.compression.options import METHODS
from deltadock.errors import DeltadockError, InvalidInput, Unauthorized
from deltadock.words import duration

if TYPE_CHECKING:
    from deltadock.client.blocking import Client

COMPLETION_SECONDS = 2.0


class State(StrEnum):
    """States of a job, and of its delta, that lists are filtered by."""

    QUEUED = "queued"
    VALIDATING = "validating"
    CALIBRATING = "calibrating"
    COMPRESSING = "compressing"
    ASSEMBLING = "assembling"
    VERIFYING = "verifying"
    READY = "ready"
    FAILED = "failed"
    CANCELLED = "cancelled"


STATES = ", ".join(State)

Url = Annotated[
    str | None,
    typer.Option(
        help="Address of the api; by default that of DELTADOCK_API_URL, of `deltadock login`, or "
        "of the `deltadock up` of this folder.",
        rich_help_panel="Server",
    ),
]


@contextmanager
def connect(url: str | None = None) -> Iterator["Client"]:
    """A client of the server; says where its key came from if it is refused.

    Raises:
        Unauthorized: there is no key for the server, or it is not valid; or it is a node.
    """
    from deltadock.client.blocking import Client
    from deltadock.client.connection import DEFAULT_URL, find_connection
    from deltadock.trust import SECRET_VARIABLE

    with Client(url, on_pause=_say_pause) as client:
        try:
            yield client
        except Unauthorized as error:
            found = find_connection(url)
            if SECRET_VARIABLE in error.message:  # which nodes alone ask for
                raise Unauthorized(
                    f"{found.url} is a node. Give the api's address, such as {DEFAULT_URL}."
                ) from error
            came = "No key was sent." if found.key is None else f"The key is from {found.key_from}."
            raise Unauthorized(
                f"{error.message} {came} `deltadock login {found.url}` keeps one."
            ) from error


def uses_server(home: Path | None, url: str | None) -> bool:
    """Whether a server is asked, with an admin key, instead of its database.

    It is if `--url`, DELTADOCK_API_URL or a login names one, unless this process is told where the
    database is.
    """
    from deltadock.client.connection import LOGIN, URL_VARIABLE, find_connection

    if url is not None:
        return True
    told = home is not None or "DELTADOCK_DATABASE_URL" in os.environ
    return not told and find_connection().url_from in (URL_VARIABLE, LOGIN)


def check_works_here(home: Path | None) -> None:
    """Check that a command which works on database and store is not meant for a server elsewhere.

    Raises:
        InvalidInput: a server is named, and neither a home nor a database is.
    """
    from deltadock.client.connection import find_connection

    if "DELTADOCK_HOME" not in os.environ and uses_server(home, None):
        found = find_connection()
        raise InvalidInput(
            f"This works on a database and its blobs, not through the server {found.url} that "
            f"{found.url_from} names. Run it where that server's database is, with "
            "DELTADOCK_DATABASE_URL, or name a folder with --home."
        )


def _say_pause(seconds: float, error: DeltadockError) -> None:
    say(f"Waiting {duration(seconds)}: {error.message}")


def _names(kind: str, typed: str) -> list[str]:
    """Names that begin with what was typed; none if the server does not answer at once."""
    from deltadock.client.blocking import Client

    try:
        with Client() as client:
            client._http.timeout = COMPLETION_SECONDS
            if kind == "base":
                found = [base.name for base in islice(client.bases(), 200)]
            elif kind == "node":
                found = [node.address for node in client.nodes()]
            elif kind == "job":
                found = [job.id for job in islice(client.jobs(), 200)]
            else:
                found = [model.name for model in islice(client.models(), 200)]
    except DeltadockError:
        return []
    return [name for name in found if name.startswith(typed)]


def complete_base(incomplete: str) -> list[str]:
    """Complete a base's name."""
    return _names("base", incomplete)


def complete_model(incomplete: str) -> list[str]:
    """Complete a model's name."""
    return _names("model", incomplete)


def complete_job(incomplete: str) -> list[str]:
    """Complete a job's id."""
    return _names("job", incomplete)


def complete_node(incomplete: str) -> list[str]:
    """Complete a node's address."""
    return _names("node", incomplete)


def complete_method(incomplete: str) -> list[str]:
    """Complete a compression method's name."""
    return [name for name in METHODS if name.startswith(incomplete)]


Reference = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="project/model, project/model:3, project/model@alias, or an id.",
        autocompletion=complete_model,
    ),
]
JobReference = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="A job's id, or its delta's name or id.", autocompletion=complete_job
    ),
]
