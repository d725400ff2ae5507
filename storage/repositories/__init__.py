"""All database queries. A repository uses the caller's session and never commits."""

from deltadock.storage.repositories.audit import AuditRepository
from deltadock.storage.repositories.checkpoints import BaseRepository, CheckpointRepository
from deltadock.storage.repositories.deltas import DeltaRepository
from deltadock.storage.repositories.idempotency import IdempotencyRepository
from deltadock.storage.repositories.jobs import JobRepository
from deltadock.storage.repositories.models import ModelRepository
from deltadock.storage.repositories.nodes import NodeRepository
from deltadock.storage.repositories.retention import RetentionRepository
from deltadock.storage.repositories.tenants import KeyRepository, TenantRepository, Usage
from deltadock.storage.repositories.totals import TotalsRepository
from deltadock.storage.repositories.uploads import UploadRepository
from deltadock.storage.repositories.webhooks import WebhookRepository

__all__ = [
    "AuditRepository",
    "BaseRepository",
    "CheckpointRepository",
    "DeltaRepository",
    "IdempotencyRepository",
    "JobRepository",
    "KeyRepository",
    "ModelRepository",
    "NodeRepository",
    "RetentionRepository",
    "TenantRepository",
    "TotalsRepository",
    "UploadRepository",
    "Usage",
    "WebhookRepository",
]
