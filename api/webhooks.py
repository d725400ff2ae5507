"""Webhooks: URLs that are told about events, and the messages to them."""

import base64
import secrets
from contextlib import suppress
from datetime import datetime
from ipaddress import ip_address
from typing import Annotated, Final, Self

from fastapi import Path, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, HttpUrl, Strict, TypeAdapter
from sqlalchemy.orm import Session

from deltadock.addresses import is_public
from deltadock.api.access import CallerDep
from deltadock.api.dependencies import ReadSession, ResourcesDep, WriteUnit
from deltadock.api.idempotency import OnceDep
from deltadock.api.paging import After, Cursor, Limit
from deltadock.api.routing import api_router
from deltadock.api.schemas import EXAMPLE_TIME, RequestBody
from deltadock.errors import Conflict, IdempotencyKeyReused, InvalidInput, NotFound
from deltadock.problems import problems
from deltadock.storage.repositories import WebhookRepository
from deltadock.storage.tables import DeliveryRow, DeliveryState, WebhookEvent, WebhookRow

router = api_router("/v1/webhooks", tags=["webhooks"])

EXAMPLE_WEBHOOK_ID: Final = "whk_k7wq2mzv5c3xj6nhy4tbr2dfsa"
EXAMPLE_MESSAGE_ID: Final = "msg_k7wq2mzv5c3xj6nhy4tbr2dfsa"
EXAMPLE_URL: Final = "https://hooks.example.com/deltadock"
SECRET_BYTES: Final = 32

_LABEL: Final = r"(?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
URL_PATTERN: Final = (
    rf"^https?://(?:[A-Za-z0-9]{_LABEL}\.)*[A-Za-z]{_LABEL}"
    r"(?::[1-9][0-9]{0,3})?(?:[/?#][!-~]*)?$"
)
"""Of usual URLs; hosts are written as public addresses and in Unicode too."""

_CURSOR: Final = Cursor("messages", datetime, str)

WebhookId = Annotated[str, Path(examples=[EXAMPLE_WEBHOOK_ID])]
MessageId = Annotated[str, Path(examples=[EXAMPLE_MESSAGE_ID])]


def _check_url(url: str) -> str:
    parsed = TypeAdapter(HttpUrl).validate_python(url)
    if parsed.username or parsed.password:
        raise ValueError("a user or password in the URL would be listed; leave it out")
    return url


class WebhookIn(RequestBody):
    """A URL to tell about events."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"url": EXAMPLE_URL, "events": ["delta.ready"]}]}
    )

    url: Annotated[
        str,
        Field(
            max_length=2048,
            examples=[EXAMPLE_URL],
            description="http or https.",
            json_schema_extra={"pattern": URL_PATTERN},
        ),
        AfterValidator(_check_url),
    ]
    events: list[Annotated[WebhookEvent, Strict(False)]] = Field(
        default_factory=lambda: list(WebhookEvent),
        min_length=1,
        max_length=len(WebhookEvent),
        description="By default all.",
    )


class WebhookOut(BaseModel):
    """A webhook."""

    id: str = Field(examples=[EXAMPLE_WEBHOOK_ID])
    url: str = Field(examples=[EXAMPLE_URL])
    events: list[WebhookEvent]
    created_at: datetime = Field(examples=[EXAMPLE_TIME])

    @classmethod
    def of(cls, webhook: WebhookRow) -> Self:
        """Convert a row."""
        return cls.model_validate(webhook, from_attributes=True)


class NewWebhook(WebhookOut):
    """A new webhook with its secret, which is shown only once."""

    secret: str = Field(
        description="Verifies the header Webhook-Signature (Standard Webhooks).",
        examples=["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYo="],
    )


class WebhookList(BaseModel):
    """All webhooks, oldest first."""

    data: list[WebhookOut]


class MessageOut(BaseModel):
    """A message to a webhook; its id is the header Webhook-Id of every attempt."""

    id: str = Field(examples=[EXAMPLE_MESSAGE_ID])
    event: WebhookEvent
    state: DeliveryState
    attempts: int = Field(examples=[1])
    status: int | None = Field(description="HTTP status of the last answer.", examples=[200])
    error: str | None = Field(description="Why the last attempt failed.")
    body: str = Field(description="The JSON that is sent.")
    created_at: datetime = Field(examples=[EXAMPLE_TIME])
    next_attempt_at: datetime | None
    delivered_at: datetime | None

    @classmethod
    def of(cls, delivery: DeliveryRow) -> Self:
        """Convert a row."""
        return cls.model_validate(delivery, from_attributes=True)


class MessagePage(BaseModel):
    """Messages, newest first. `next` is the next page's `after`; null on the last page."""

    data: list[MessageOut]
    next: str | None = Field(description="Opaque.")


def _require(session: Session, tenant_id: str, webhook_id: str) -> WebhookRow:
    webhook = WebhookRepository(session, tenant_id).find(webhook_id)
    if webhook is None:
        raise NotFound(f"There is no webhook {webhook_id!r}; GET /v1/webhooks lists them.")
    return webhook


def _check_address(url: str, *, private: bool) -> None:
    """Refuse what no worker would connect to; those look names up, whose addresses may change."""
    host = (HttpUrl(url).host or "").strip("[]")
    with suppress(ValueError):  # a name
        address = ip_address(host)
        if not private and not is_public(address):
            raise InvalidInput(
                f"{address} is not a public address. An operator may allow it by "
                "DELTADOCK_WEBHOOK_PRIVATE_ADDRESSES=true."
            )


@router.post("", status_code=201, responses=problems(InvalidInput, Conflict, IdempotencyKeyReused))
def create_webhook(
    body: WebhookIn,
    caller: CallerDep,
    unit: WriteUnit,
    once: OnceDep,
    resources: ResourcesDep,
    response: Response,
) -> NewWebhook:
    """Tell a URL about events; the answer has the secret that verifies the messages, once."""
    _check_address(body.url, private=resources.settings.webhook_private_addresses)

    def create() -> NewWebhook:
        secret = f"whsec_{base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()}"
        events = list(dict.fromkeys(body.events))
        webhook = WebhookRepository(unit.session, caller.tenant_id).add(body.url, events, secret)
        return NewWebhook.of(webhook)

    return once.answer(NewWebhook, body, response, create)


@router.get("")
def list_webhooks(caller: CallerDep, session: ReadSession) -> WebhookList:
    """List the webhooks."""
    found = WebhookRepository(session, caller.tenant_id).all()
    return WebhookList(data=[WebhookOut.of(webhook) for webhook in found])


@router.get("/{webhook_id}", responses=problems(NotFound))
def get_webhook(webhook_id: WebhookId, caller: CallerDep, session: ReadSession) -> WebhookOut:
    """Get one webhook."""
    return WebhookOut.of(_require(session, caller.tenant_id, webhook_id))


@router.delete("/{webhook_id}", status_code=204, responses=problems(NotFound))
def delete_webhook(webhook_id: WebhookId, caller: CallerDep, unit: WriteUnit) -> None:
    """Delete a webhook with its messages; what is not sent yet is not sent."""
    webhook = _require(unit.session, caller.tenant_id, webhook_id)
    WebhookRepository(unit.session, caller.tenant_id).delete(webhook)


@router.get("/{webhook_id}/messages", responses=problems(NotFound, InvalidInput))
def list_messages(
    webhook_id: WebhookId,
    caller: CallerDep,
    session: ReadSession,
    after: After = None,
    limit: Limit = 50,
) -> MessagePage:
    """List a webhook's messages of the last 30 days, newest first, with what became of them."""
    webhook = _require(session, caller.tenant_id, webhook_id)
    webhooks = WebhookRepository(session, caller.tenant_id)
    found = webhooks.deliveries(webhook, limit=limit + 1, after=_CURSOR.read(after))
    page, next_after = _CURSOR.page(found, limit, lambda message: (message.created_at, message.id))
    return MessagePage(data=[MessageOut.of(delivery) for delivery in page], next=next_after)


@router.post("/{webhook_id}/messages/{message_id}/resend", responses=problems(NotFound))
def resend_message(
    webhook_id: WebhookId, message_id: MessageId, caller: CallerDep, unit: WriteUnit
) -> MessageOut:
    """Send a message again, whatever became of it."""
    webhook = _require(unit.session, caller.tenant_id, webhook_id)
    webhooks = WebhookRepository(unit.session, caller.tenant_id)
    delivery = webhooks.find_delivery(webhook, message_id)
    if delivery is None:
        raise NotFound(f"There is no message {message_id!r} to webhook {webhook_id}.")
    webhooks.resend(delivery)
    return MessageOut.of(delivery)
