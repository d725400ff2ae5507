"""`deltadock login` and `logout`: keep the address of a server, and the key for it."""

import sys
from typing import Annotated

import typer

from deltadock.cli.output import AsJson, print_json, say
from deltadock.errors import InvalidInput, NotFound

Address = Annotated[str | None, typer.Argument(metavar="URL", help="Address of the api.")]


def login(
    url: Address = None,
    key: Annotated[
        str | None,
        typer.Option(help="An API key; by default it is asked for, or read from a pipe."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check an API key with a server and keep both, readable only by you."""
    from deltadock.client.blocking import Client
    from deltadock.client.connection import find_connection, keep_login

    address = find_connection(url, key).url
    if key is None:
        if sys.stdin.isatty():
            key = typer.prompt(f"API key for {address}", hide_input=True, err=True)
        else:
            key = sys.stdin.readline()
    key = key.strip()
    if not key:
        raise InvalidInput("There is no key: `deltadock keys create` on the server makes one.")
    with Client(address, key) as client:
        next(client.bases(), None)  # the first request that needs a key
    path = keep_login(address, key)
    if as_json:
        print_json({"url": address, "file": str(path)})
    else:
        say(f"Logged in to {address}; kept in {path}.")


def logout(as_json: AsJson = False) -> None:
    """Forget the server and key of `deltadock login`."""
    from deltadock.client.connection import login_path, read_login

    kept = read_login()
    if kept is None:
        raise NotFound("You are not logged in.")
    login_path().unlink()
    if as_json:
        print_json({"url": kept[0]})
    else:
        say(f"Logged out of {kept[0]}.")
