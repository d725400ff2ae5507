"""Sends the outbox's messages to webhooks, signed as Standard Webhooks specifies.

The host's name is resolved here, every address is checked, and the connection goes to a checked
address: a name cannot be made to point to another address in between. Redirects are not followed.
"""

import ipaddress
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple

import httpx
import structlog
from standardwebhooks import Webhook

from deltadock.storage.models import DeliveryRow
from deltadock.storage.repositories import WebhookRepository
from deltadock.storage.tenancy import EVERY_TENANT
from deltadock.version import __version__
from deltadock.workers.compress import WorkerContext
from deltadock.workers.metrics import WEBHOOKS

BATCH: Final = 20
TIMEOUT: Final = httpx.Timeout(10.0, connect=5.0)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that stand for IPv4 ones; so do `ipv4_mapped`, 6to4 and Teredo."""

log = structlog.get_logger(__name__)


class Outcome(NamedTuple):
    """The answer's status, if there was an answer, and what went wrong, if anything did."""

    status: int | None
    error: str | None


def deliver_due(context: WorkerContext) -> int:
    """Send the due messages of every tenant; returns how many were tried."""
    with context.database.session_scope() as session:
        due = WebhookRepository(session, EVERY_TENANT).claim_due(BATCH)
    for delivery in due:
        outcome = send(delivery, private=context.settings.webhook_private_addresses)
        WEBHOOKS.labels("delivered" if outcome.error is None else "failed").inc()
        if outcome.error is not None:
            log.info("webhook_not_delivered", message=delivery.id, error=outcome.error)
        with context.database.session_scope() as session:
            WebhookRepository(session, EVERY_TENANT).record(
                delivery.id, status=outcome.status, error=outcome.error
            )
    return len(due)


def send(delivery: DeliveryRow, *, private: bool) -> Outcome:
    """Send one message; any 2xx delivers it.

    Args:
        delivery: with its webhook loaded.
        private: whether addresses inside networks are allowed.
    """
    url = httpx.URL(delivery.webhook.url)
    try:
        address = _address_of(url, private=private)
    except ValueError as error:
        return Outcome(None, str(error))
    now = datetime.now(UTC)
    signer = Webhook(delivery.webhook.secret)
    headers = {
        "Host": url.netloc.decode("ascii"),
        "Content-Type": "application/json",
        "User-Agent": f"deltadock/{__version__}",
        "Webhook-Id": delivery.id,
        "Webhook-Timestamp": str(int(now.timestamp())),
        "Webhook-Signature": signer.sign(delivery.id, now, delivery.body),
    }
    try:
        with (
            httpx.Client(timeout=TIMEOUT, trust_env=False, follow_redirects=False) as client,
            # The answer's body is not read: it decides nothing, and may be of any size.
            client.stream(
                "POST",
                url.copy_with(host=str(address)),
                content=delivery.body.encode(),
                headers=headers,
                extensions={"sni_hostname": url.host},
            ) as answer,
        ):
            status = answer.status_code
    except httpx.HTTPError as error:
        return Outcome(None, f"{type(error).__name__}: {error}")
    return Outcome(status, None if 200 <= status < 300 else f"It answered {status}.")


def _address_of(url: httpx.URL, *, private: bool) -> Address:
    """An address of the URL's host, of which all are allowed.

    Raises:
        ValueError: the host is unknown, or an address is not allowed.
    """
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"The host {url.host!r} is unknown: {error}") from error
    addresses: Sequence[Address] = [
        ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found
    ]
    for address in addresses:
        if not private and not is_public(address):
            raise ValueError(
                f"The host {url.host!r} has the address {address}, which is not a public one. An "
                "operator may allow it by DELTADOCK_WEBHOOK_PRIVATE_ADDRESSES=true."
            )
    return addresses[0]


def is_public(address: Address) -> bool:
    """Whether the address belongs to the internet, also where it stands for an IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in NAT64 or address.sixtofour is not None or address.teredo is not None:
            return False
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
    return address.is_global and not address.is_multicast and not address.is_reserved
