"""Sends the outbox's messages to webhooks, signed as Standard Webhooks specifies.

The host's name is resolved here, every address is checked, and the connection goes to a checked
address: a name cannot be made to point to another address in between. Redirects are not followed.
"""

import ipaddress
import socket
from collections import Counter
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Final, NamedTuple

import anyio
import httpx
import structlog
from anyio import to_thread
from standardwebhooks import Webhook

from deltadock.addresses import Address, is_public
from deltadock.storage.repositories import WebhookRepository
from deltadock.storage.tables import DeliveryRow
from deltadock.storage.tenancy import EVERY_TENANT
from deltadock.version import __version__
from deltadock.workers.compress import WorkerContext
from deltadock.workers.lease import STOPPING
from deltadock.workers.metrics import WEBHOOKS

SECONDS: Final = 15.0
"""For one message, from looking up the host to the answer's status."""
MAX_SENDING: Final = 16
"""Messages on their way at once."""
MAX_OF_TENANT: Final = 2
"""Of these, those of one tenant."""
POLL_SECONDS: Final = 2.0
"""Interval at which the outbox is looked at."""

log = structlog.get_logger(__name__)


class Outcome(NamedTuple):
    """The answer's status, if there was an answer, and what went wrong, if anything did."""

    status: int | None
    error: str | None


def deliver_due(context: WorkerContext) -> int:
    """Send the messages of every tenant that are due, until none is; returns how many were tried.

    A receiver may take its time: a message is claimed only when it can be sent at once, and no
    tenant's messages keep those of another waiting.
    """
    return anyio.run(_Outbox(context).deliver_due)


class _Outbox:
    """Messages on their way, each in a task of its own."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._sending: Counter[str] = Counter()
        """Messages on their way, by tenant."""
        self._ended: anyio.Event
        """Set when one of them has ended."""

    async def deliver_due(self) -> int:
        tried = 0
        async with anyio.create_task_group() as group:
            while not STOPPING.is_set():
                self._ended = anyio.Event()
                delivery = None
                # A claim passes by what was busy when it began, so only one that began with nothing
                # on its way tells that nothing is due.
                idle = not self._sending
                if self._sending.total() < MAX_SENDING:
                    busy = [one for one, sent in self._sending.items() if sent >= MAX_OF_TENANT]
                    delivery = await to_thread.run_sync(self._claim, busy)
                if delivery is not None:
                    tried += 1
                    self._sending[delivery.webhook.tenant_id] += 1
                    group.start_soon(self._deliver, delivery)
                elif idle:
                    break
                else:
                    with anyio.move_on_after(POLL_SECONDS):  # others' messages become due
                        await self._ended.wait()
        return tried

    def _claim(self, busy: Collection[str]) -> DeliveryRow | None:
        with self._context.database.session_scope() as session:
            return WebhookRepository(session, EVERY_TENANT).claim_due(busy=busy)

    async def _deliver(self, delivery: DeliveryRow) -> None:
        with anyio.CancelScope(shield=True):  # what is sent is recorded
            try:
                outcome = await send(
                    delivery, private=self._context.settings.webhook_private_addresses
                )
                await to_thread.run_sync(self._record, delivery, outcome)
            finally:
                self._sending -= Counter([delivery.webhook.tenant_id])
                self._ended.set()

    def _record(self, delivery: DeliveryRow, outcome: Outcome) -> None:
        WEBHOOKS.labels("delivered" if outcome.error is None else "failed").inc()
        if outcome.error is not None:
            log.info("webhook_not_delivered", message=delivery.id, error=outcome.error)
        with self._context.database.session_scope() as session:
            WebhookRepository(session, EVERY_TENANT).record(
                delivery.id, status=outcome.status, error=outcome.error
            )


async def send(delivery: DeliveryRow, *, private: bool) -> Outcome:
    """Send one message; any 2xx within `SECONDS` delivers it.

    Args:
        delivery: with its webhook loaded.
        private: whether addresses inside networks are allowed.
    """
    try:
        with anyio.fail_after(SECONDS):
            status = await _post(delivery, private=private)
    except TimeoutError:
        return Outcome(None, f"It did not answer within {SECONDS:.0f} s.")
    except ValueError as error:
        return Outcome(None, str(error))
    except httpx.HTTPError as error:
        return Outcome(None, f"{type(error).__name__}: {error}")
    except Exception:  # whatever a URL or its server causes may not keep the others waiting
        log.exception("webhook_not_sent", message=delivery.id)
        return Outcome(None, "It could not be sent; the worker's log says why.")
    return Outcome(status, None if 200 <= status < 300 else f"It answered {status}.")


async def _post(delivery: DeliveryRow, *, private: bool) -> int:
    """Send one message; returns the answer's status.

    Raises:
        ValueError: the host is unknown, or an address is not allowed.
        httpx.HTTPError: there is no answer.
    """
    url = httpx.URL(delivery.webhook.url)
    address = await to_thread.run_sync(
        partial(_address_of, url, private=private), abandon_on_cancel=True
    )
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
    async with (
        httpx.AsyncClient(timeout=None, trust_env=False, follow_redirects=False) as client,
        # The answer's body is not read: it decides nothing, and may be of any size.
        client.stream(
            "POST",
            url.copy_with(host=str(address)),
            content=delivery.body.encode(),
            headers=headers,
            extensions={"sni_hostname": url.host},
        ) as answer,
    ):
        return answer.status_code


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
