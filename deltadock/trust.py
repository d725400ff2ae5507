"""Secrets kept in files; authentication between the api and its nodes.

Those share a secret or, without one, accept only requests from loopback.
"""

import hmac
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from deltadock.errors import Unauthorized

SECRET_VARIABLE: Final = "DELTADOCK_NODE_SECRET"


def kept_secret(path: Path) -> str:
    """The secret in a file that only its owner can read; a missing one is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with _private_file(path, secrets.token_urlsafe()) as staged, suppress(FileExistsError):
            os.link(staged, path)  # of two processes the first one's is kept
    return path.read_text(encoding="utf-8").strip()


def keep_secret(path: Path, secret: str) -> None:
    """Write the secret to a file that only its owner can read, in place of another one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _private_file(path, secret) as staged:
        staged.replace(path)


@contextmanager
def _private_file(path: Path, secret: str) -> Iterator[Path]:
    """A new file beside `path`; removed at the end."""
    staged = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        staged.touch(mode=0o600)
        staged.write_text(f"{secret}\n", encoding="utf-8")
        yield staged
    finally:
        staged.unlink(missing_ok=True)


def credentials(secret: SecretStr | None) -> dict[str, str]:
    """The request headers that carry the secret."""
    return {} if secret is None else {"Authorization": f"Bearer {secret.get_secret_value()}"}


def check_trusted(secret: SecretStr | None, authorization: str | None, client: str | None) -> None:
    """Require the secret or, if none is set, a client on this machine.

    Args:
        secret: the node secret, if set.
        authorization: the request's Authorization header.
        client: the client's address; None for a Unix socket.

    Raises:
        Unauthorized: the secret is missing or wrong, or the client is on another machine.
    """
    if secret is not None:
        expected = credentials(secret)["Authorization"]
        if not hmac.compare_digest((authorization or "").encode(), expected.encode()):
            raise Unauthorized(f"Send {SECRET_VARIABLE} as a bearer token.")
    elif client is not None and not is_loopback(client):
        raise Unauthorized(
            "Without a secret only requests from this machine are accepted: set "
            f"{SECRET_VARIABLE} for the api and its nodes."
        )


def is_loopback(client: str) -> bool:
    """Whether the address is this machine's own."""
    try:
        return ip_address(client).is_loopback
    except ValueError:
        return False
