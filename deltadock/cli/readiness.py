"""Where the api of this machine is, and whether it is ready."""

import httpx

from deltadock.cli.processes import HOST


def api_url(host: str, port: int) -> str:
    """URL of the api on this machine; an unspecified address includes loopback."""
    if host in {"0.0.0.0", "::"}:
        host = HOST
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_ready(http: httpx.Client) -> bool:
    """Whether an api answers that it is ready. Making a client takes longer than the answer."""
    try:
        return http.get("/readyz").is_success
    except httpx.TransportError:
        return False


def has_node(http: httpx.Client) -> bool:
    """Whether an api that answers has a node."""
    try:
        return bool(http.get("/readyz").json()["checks"]["node"] == "ok")
    except httpx.TransportError:
        return False
