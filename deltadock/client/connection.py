"""Which server a client talks to, and with which key.

In this order: what the caller says; the environment (`DELTADOCK_API_URL`, `DELTADOCK_API_KEY`);
what `deltadock login` kept; the Deltadock that `deltadock up` last ran in the home. A kept key is
only sent to the server that it was kept for.
"""

import json
import os
import ssl
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx

from deltadock.client.requests import TIMEOUT
from deltadock.errors import InvalidInput
from deltadock.settings import read_settings
from deltadock.storage.api_keys import local_key_path
from deltadock.trust import keep_secret
from deltadock.version import __version__

DEFAULT_URL: Final = "http://127.0.0.1:8000"
URL_VARIABLE: Final = "DELTADOCK_API_URL"
KEY_VARIABLE: Final = "DELTADOCK_API_KEY"
LOGIN: Final = "`deltadock login`"


class Connection(NamedTuple):
    """A server's address, the key for it, and where each comes from, in words."""

    url: str
    key: str | None
    url_from: str
    key_from: str


def local_url_path(home: Path) -> Path:
    """The file in which `deltadock up` keeps the address of the api that it last ran."""
    return home / "api.url"


def login_path() -> Path:
    """The file in which `deltadock login` keeps address and key, readable by its owner."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "deltadock" / "login.json"


def find_connection(url: str | None = None, key: str | None = None) -> Connection:
    """The server and key to use; arguments come first."""
    kept = [(source, *found) for source, found in _kept() if found is not None]
    url_from = "given"
    if url is None and (url := os.environ.get(URL_VARIABLE)):
        url_from = URL_VARIABLE
    if not url and kept:
        url_from, url, _ = kept[0]
    if not url:
        url_from, url = "the default", DEFAULT_URL
    url = _address(url)
    if key:
        return Connection(url, key.strip(), url_from, "given")
    if key := os.environ.get(KEY_VARIABLE):
        return Connection(url, key.strip(), url_from, KEY_VARIABLE)
    for source, address, secret in kept:
        if address == url:
            return Connection(url, secret, url_from, source)
    return Connection(url, None, url_from, "nowhere")


def _address(url: str) -> str:
    """A server's address as paths follow it; OpenAI's clients take it with `/v1`."""
    return url.rstrip("/").removesuffix("/v1")


def check_connection(connection: Connection) -> None:
    """Check the server's address, and that a header can hold the key.

    Raises:
        InvalidInput: one is none; the message does not show the key.
    """
    try:
        parsed = httpx.URL(connection.url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise InvalidInput(
            f"{connection.url!r} ({connection.url_from}) is not an address such as {DEFAULT_URL}."
        )
    if connection.key and not (connection.key.isascii() and connection.key.isprintable()):
        raise InvalidInput(f"The API key ({connection.key_from}) is none: keys look like ddk_....")


def _kept() -> list[tuple[str, tuple[str, str] | None]]:
    home = read_settings().home
    return [(LOGIN, read_login()), (f"the home {home}", _of_home(home))]


def read_login() -> tuple[str, str] | None:
    """The address and key that `deltadock login` kept; None if there are none."""
    try:
        kept = json.loads(login_path().read_text(encoding="utf-8"))
        return str(kept["url"]), str(kept["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_login(url: str, key: str) -> Path:
    """Keep an address and its key; returns the file."""
    path = login_path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    keep_secret(path, json.dumps({"url": _address(url), "key": key}))
    return path


def _of_home(home: Path) -> tuple[str, str] | None:
    try:
        url, key = (
            path(home).read_text(encoding="utf-8") for path in (local_url_path, local_key_path)
        )
    except OSError:
        return None
    return url.strip(), key.strip()


@cache
def certificates() -> ssl.SSLContext:
    """The trusted certificates, which take 50 ms to load; once a process."""
    return httpx.create_ssl_context()


def http_options(url: str | None, key: str | None) -> dict[str, Any]:
    """The arguments of an httpx client.

    Raises:
        InvalidInput: the address or the key is none.
    """
    found = find_connection(url, key)
    check_connection(found)
    headers = {"User-Agent": f"deltadock/{__version__}"}
    if found.key:
        headers["Authorization"] = f"Bearer {found.key}"
    return {
        "base_url": found.url, "timeout": TIMEOUT, "headers": headers, "verify": certificates(),
    }  # fmt: skip
