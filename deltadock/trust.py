"""How the api and its nodes know each other: by a shared secret or, without one, as neighbours."""

import hmac
from ipaddress import ip_address

from pydantic import SecretStr

from deltadock.errors import Unauthorized


def credentials(secret: SecretStr | None) -> dict[str, str]:
    """The headers that bring the secret."""
    return {} if secret is None else {"Authorization": f"Bearer {secret.get_secret_value()}"}


def check_trusted(secret: SecretStr | None, authorization: str | None, client: str | None) -> None:
    """Let through who brings the secret; where there is none, who asks from this machine.

    `authorization` is the request's header of that name, `client` its address (None: a socket of
    this machine's own).

    Raises:
        Unauthorized: neither.
    """
    if secret is not None:
        expected = credentials(secret)["Authorization"]
        if not hmac.compare_digest((authorization or "").encode(), expected.encode()):
            raise Unauthorized("Send DELTADOCK_NODE_SECRET as a bearer token.")
    elif client is not None and not _is_loopback(client):
        raise Unauthorized(
            "Only this machine may do that while there is no secret: set DELTADOCK_NODE_SECRET "
            "for the api and its nodes."
        )


def _is_loopback(client: str) -> bool:
    try:
        return ip_address(client).is_loopback
    except ValueError:
        return False
