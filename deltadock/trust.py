"""Authentication between the api and its nodes: a shared secret or, without one, loopback only."""

import hmac
from ipaddress import ip_address

from pydantic import SecretStr

from deltadock.errors import Unauthorized


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
            raise Unauthorized("Send DELTADOCK_NODE_SECRET as a bearer token.")
    elif client is not None and not _is_loopback(client):
        raise Unauthorized(
            "Without a secret only requests from this machine are accepted: set "
            "DELTADOCK_NODE_SECRET for the api and its nodes."
        )


def _is_loopback(client: str) -> bool:
    try:
        return ip_address(client).is_loopback
    except ValueError:
        return False
