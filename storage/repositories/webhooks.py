"""Webhooks and the outbox of their messages."""

import json
from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import delete, func, select, tuple_, update
from sqlalchemy.orm import Session, contains_eager

from deltadock.errors import Conflict, DeltadockError
from deltadock.storage.database import database_now, lock_key
from deltadock.storage.ids import new_id
from deltadock.storage.repositories.audit import record
from deltadock.storage.repositories.listing import Key
from deltadock.storage.tables import (
    AuditAction,
    DeliveryRow,
    DeliveryState,
    DeltaRow,
    WebhookEvent,
    WebhookRow,
)
from deltadock.storage.tenancy import Tenant, owned_by, owner_of

RETRY_SECONDS: Final = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Waits between attempts, as Standard Webhooks recommends; after the last one a message fails."""
CLAIM_SECONDS: Final = 120
"""A message taken by a worker that does not record an outcome for so long is sent again."""
KEPT: Final = timedelta(days=30)
"""For how long delivered and failed messages are listed."""
MAX_WEBHOOKS: Final = 20
"""Webhooks of one tenant."""


class WebhookRepository:
    """A tenant's webhooks and their messages; workers send those of every tenant."""

    def __init__(self, session: Session, tenant: Tenant) -> None:
        self.session = session
        self.tenant = tenant

    def add(self, url: str, events: Sequence[WebhookEvent], secret: str) -> WebhookRow:
        """Register a URL.

        Raises:
            Conflict: the tenant has `MAX_WEBHOOKS` already.
        """
        owner = owner_of(self.tenant)
        lock_key(self.session, "webhooks", owner)
        count = self.session.scalar(
            select(func.count()).select_from(WebhookRow).where(WebhookRow.tenant_id == owner)
        )
        if (count or 0) >= MAX_WEBHOOKS:
            raise Conflict(f"There are {MAX_WEBHOOKS} webhooks already; delete one first.")
        webhook = WebhookRow(
            id=new_id("whk"), tenant_id=owner, url=url, events=list(events), secret=secret,
            created_at=database_now(self.session),
        )  # fmt: skip
        self.session.add(webhook)
        self.session.flush()
        record(
            self.session, owner, AuditAction.WEBHOOK_CREATE, webhook.id,
            url=url, events=webhook.events,
        )  # fmt: skip
        return webhook

    def all(self) -> Sequence[WebhookRow]:
        """The webhooks, oldest first."""
        return self.session.scalars(
            select(WebhookRow)
            .where(owned_by(WebhookRow.tenant_id, self.tenant))
            .order_by(WebhookRow.created_at, WebhookRow.id)
        ).all()

    def find(self, webhook_id: str) -> WebhookRow | None:
        """The webhook with this id, or None."""
        return self.session.scalars(
            select(WebhookRow).where(
                WebhookRow.id == webhook_id, owned_by(WebhookRow.tenant_id, self.tenant)
            )
        ).one_or_none()

    def delete(self, webhook: WebhookRow) -> None:
        """Delete a webhook with its messages, sent or not."""
        self.session.execute(delete(DeliveryRow).where(DeliveryRow.webhook_id == webhook.id))
        self.session.delete(webhook)
        self.session.flush()
        record(self.session, webhook.tenant_id, AuditAction.WEBHOOK_DELETE, webhook.id)

    def publish(self, event: WebhookEvent, data: dict[str, Any]) -> None:
        """Put a message for each webhook of this event into the outbox, in this transaction."""
        webhooks = [webhook for webhook in self.all() if event in webhook.events]
        if not webhooks:
            return
        now = database_now(self.session)
        body = json.dumps({"type": event, "timestamp": now.isoformat(), "data": data})
        for webhook in webhooks:
            self.session.add(
                DeliveryRow(
                    id=new_id("msg"), webhook_id=webhook.id, event=event, body=body,
                    next_attempt_at=now, created_at=now,
                )
            )  # fmt: skip
        self.session.flush()

    def publish_outcome(self, delta: DeltaRow, error: DeltadockError | None = None) -> None:
        """Tell of a delta that is ready, or failed with `error`, in this transaction."""
        data: dict[str, Any] = {
            "delta": delta.id,
            "name": delta.name,
            "version": delta.version,
            "job": delta.job.id,
        }
        if error is None:
            data |= {"artifact": delta.artifact_digest, "bytes": delta.artifact_bytes}
            self.publish(WebhookEvent.DELTA_READY, data)
        else:
            data["error"] = {"code": error.code, "message": error.message}
            self.publish(WebhookEvent.DELTA_FAILED, data)

    def deliveries(
        self, webhook: WebhookRow, *, limit: int, after: Key | None = None
    ) -> Sequence[DeliveryRow]:
        """Up to `limit` messages to a webhook, newest first, that follow the place `after`."""
        query = (
            select(DeliveryRow)
            .where(DeliveryRow.webhook_id == webhook.id)
            .order_by(DeliveryRow.created_at.desc(), DeliveryRow.id.desc())
            .limit(limit)
        )
        if after is not None:
            place = tuple_(DeliveryRow.created_at, DeliveryRow.id)
            query = query.where(place < after)
        return self.session.scalars(query).all()

    def find_delivery(self, webhook: WebhookRow, delivery_id: str) -> DeliveryRow | None:
        """A message to a webhook, or None."""
        return self.session.scalars(
            select(DeliveryRow).where(
                DeliveryRow.id == delivery_id, DeliveryRow.webhook_id == webhook.id
            )
        ).one_or_none()

    def claim_due(self, *, busy: Collection[str]) -> DeliveryRow | None:
        """Take the first due message, with its webhook, of a tenant that is not `busy`.

        Other workers skip it.
        """
        now = database_now(self.session)
        due = self.session.scalars(
            select(DeliveryRow)
            .join(DeliveryRow.webhook)
            .options(contains_eager(DeliveryRow.webhook))
            .where(
                DeliveryRow.state == DeliveryState.PENDING,
                DeliveryRow.next_attempt_at <= now,
                WebhookRow.tenant_id.not_in(busy),
            )
            .order_by(DeliveryRow.next_attempt_at)
            .limit(1)
            .with_for_update(skip_locked=True, of=DeliveryRow)
        ).one_or_none()
        if due is not None:
            due.next_attempt_at = now + timedelta(seconds=CLAIM_SECONDS)
            self.session.flush()
        return due

    def record(self, delivery_id: str, *, status: int | None, error: str | None) -> None:
        """Record an attempt; without an error the message is delivered, else it is sent later."""
        found = self.session.get(DeliveryRow, delivery_id, with_for_update=True)
        if found is None or found.state is not DeliveryState.PENDING:
            return
        now = database_now(self.session)
        found.attempts += 1
        found.status, found.error = status, error
        if error is None:
            found.state, found.delivered_at, found.next_attempt_at = (
                DeliveryState.DELIVERED, now, None,
            )  # fmt: skip
        elif found.attempts > len(RETRY_SECONDS):
            found.state, found.next_attempt_at = DeliveryState.FAILED, None
        else:
            wait = RETRY_SECONDS[found.attempts - 1]
            found.next_attempt_at = now + timedelta(seconds=wait)
        self.session.flush()

    def resend(self, delivery: DeliveryRow) -> None:
        """Send a message again, now and from the first wait on."""
        self.session.execute(
            update(DeliveryRow)
            .where(DeliveryRow.id == delivery.id)
            .values(
                state=DeliveryState.PENDING, attempts=0,
                next_attempt_at=database_now(self.session), delivered_at=None,
            )
        )  # fmt: skip
        self.session.refresh(delivery)
        record(
            self.session, owner_of(self.tenant), AuditAction.WEBHOOK_RESEND, delivery.webhook_id,
            message=delivery.id,
        )  # fmt: skip

    def drop_old(self) -> None:
        """Delete messages that are no longer listed."""
        self.session.execute(
            delete(DeliveryRow).where(
                DeliveryRow.state != DeliveryState.PENDING,
                DeliveryRow.created_at <= database_now(self.session) - KEPT,
            )
        )
