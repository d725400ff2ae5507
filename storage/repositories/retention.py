"""Projects' retention rules, and which uploads they drop."""

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple, Self

from sqlalchemy import Select, and_, delete, exists, or_, select
from sqlalchemy.orm import Session

from deltadock.storage.repositories.audit import record
from deltadock.storage.repositories.blobs import BATCH, BlobRepository, lock_blobs
from deltadock.storage.tables import (
    AuditAction,
    BaseRow,
    DeltaRow,
    JobRow,
    JobState,
    RetentionRow,
    UploadKind,
    UploadRow,
    UploadState,
)
from deltadock.storage.tenancy import Tenant, owner_of


class RetentionRepository:
    """The rules of a tenant's projects."""

    def __init__(self, session: Session, tenant: Tenant) -> None:
        self.session = session
        self.tenant = tenant

    def find(self, project: str) -> str | None:
        """The project's rule, or None."""
        found = self.session.get(RetentionRow, (owner_of(self.tenant), project))
        return None if found is None else found.rule

    def put(self, project: str, rule: str) -> None:
        """Set the project's rule."""
        row = RetentionRow(tenant_id=owner_of(self.tenant), project=project, rule=rule)
        self.session.merge(row)
        self.session.flush()
        self._record(project, rule)

    def delete(self, project: str) -> None:
        """Remove the project's rule, if it has one."""
        self.session.execute(
            delete(RetentionRow).where(
                RetentionRow.tenant_id == owner_of(self.tenant), RetentionRow.project == project
            )
        )
        self._record(project, None)

    def _record(self, project: str, rule: str | None) -> None:
        owner = owner_of(self.tenant)
        record(self.session, owner, AuditAction.RETENTION_CHANGE, project, rule=rule)


class Rule(NamedTuple):
    """When a project's fine-tune is dropped (see `RetentionRow`)."""

    days: int | None
    """After the end of its delta's job; None: never."""
    drops_unsuccessful: bool
    """Whether also if the job failed or was cancelled."""

    @classmethod
    def parse(cls, rule: str) -> Self:
        """What `keep`, `ready` or a number of days means."""
        match rule:
            case "keep":
                return cls(None, drops_unsuccessful=False)
            case "ready":
                return cls(0, drops_unsuccessful=False)
            case days:
                return cls(int(days), drops_unsuccessful=True)

    def drops(self, state: JobState, finished: datetime | None, limits: "DropLimits") -> bool:
        """Whether the fine-tune of a job in this state is dropped."""
        if self.days is None or finished is None:
            return False
        is_kept = not self.drops_unsuccessful or finished >= limits.undo_from
        if state is not JobState.READY and is_kept:
            return False
        return finished <= limits.now - timedelta(days=self.days)


class DropLimits(NamedTuple):
    """When uploads are dropped."""

    now: datetime
    default: Rule
    """Of projects without a rule."""
    texts_before: datetime | None
    """Calibration texts from before this are dropped; None: no texts are."""
    undo_from: datetime
    """Jobs that failed since may continue, and need their inputs."""


class DroppableUploads:
    """Complete uploads, of all tenants, that no base or job needs and the rules drop."""

    def __init__(self, session: Session, limits: DropLimits) -> None:
        self.session = session
        self.limits = limits

    def find(self, among: Collection[str] | None = None) -> list[str]:
        """Ids of these uploads, or of those `among` these ids.

        A checkpoint that has been neither a base nor the fine-tune of a delta that is not given up
        since `undo_from` is dropped by every rule.
        """
        projects = {
            (row.tenant_id, row.project): Rule.parse(row.rule)
            for row in self.session.scalars(select(RetentionRow))
        }
        is_base = exists().where(
            BaseRow.checkpoint_digest == UploadRow.checkpoint_digest,
            or_(BaseRow.deleted_at.is_(None), BaseRow.deleted_at >= self.limits.undo_from),
        )
        is_finetune = exists().where(
            DeltaRow.checkpoint_digest == UploadRow.checkpoint_digest,
            DeltaRow.tenant_id == UploadRow.tenant_id,
            DeltaRow.collected_at.is_(None),
        )
        checkpoints = self._complete(UploadKind.CHECKPOINT, among).where(~is_base)
        unused = checkpoints.where(~is_finetune, UploadRow.updated_at < self.limits.undo_from)
        found = list(self.session.scalars(unused.with_only_columns(UploadRow.id)))
        if any(rule.days is not None for rule in (self.limits.default, *projects.values())):
            found += self._finetunes(checkpoints, projects)
        if self.limits.texts_before is not None:
            old = UploadRow.updated_at < self.limits.texts_before
            texts = self.session.scalars(
                self._complete(UploadKind.CALIBRATION, among).where(old)
            ).all()
            if texts:
                in_use = BlobRepository(self.session).texts_of_jobs(self.limits.undo_from)
                found += [text.id for text in texts if text.calibration_digest not in in_use]
        return found

    def lock(self, upload_ids: Collection[str]) -> list[UploadRow]:
        """Lock complete uploads, in one order for all, and return those that still are of them."""
        rows = select(UploadRow).where(UploadRow.id.in_(upload_ids)).order_by(UploadRow.id)
        digests = (
            upload.checkpoint_digest or upload.calibration_digest or ""
            for upload in self.session.scalars(rows)
        )
        lock_blobs(self.session, *digests)
        locked = self.session.scalars(
            rows.with_for_update(), execution_options={"populate_existing": True}
        ).all()
        still = set(self.find(upload_ids))
        return [upload for upload in locked if upload.id in still]

    def _complete(self, kind: UploadKind, among: Collection[str] | None) -> Select[UploadRow]:
        found = select(UploadRow).where(
            UploadRow.state == UploadState.COMPLETE, UploadRow.kind == kind
        )
        return found if among is None else found.where(UploadRow.id.in_(among))

    def _finetunes(
        self, checkpoints: Select[UploadRow], projects: Mapping[tuple[str, str], Rule]
    ) -> list[str]:
        """Ids of those that the rules of all projects with a delta of the fine-tune drop."""
        wanted = checkpoints.with_only_columns(UploadRow.tenant_id, UploadRow.checkpoint_digest)
        distinct = wanted.distinct().subquery()
        deltas = self.session.execute(
            select(
                DeltaRow.tenant_id,
                DeltaRow.checkpoint_digest,
                DeltaRow.name,
                JobRow.state,
                JobRow.finished_at,
            )
            .join(
                distinct,
                and_(
                    DeltaRow.tenant_id == distinct.c.tenant_id,
                    DeltaRow.checkpoint_digest == distinct.c.checkpoint_digest,
                ),
            )
            .join(DeltaRow.job),
            execution_options={"yield_per": BATCH},
        )
        drops: dict[tuple[str, str | None], bool] = {}
        for tenant, digest, name, state, finished in deltas:
            rule = projects.get((tenant, name.partition("/")[0]), self.limits.default)
            of_all = drops.get((tenant, digest), True)
            drops[tenant, digest] = of_all and rule.drops(state, finished, self.limits)
        uploads = self.session.execute(wanted.add_columns(UploadRow.id))
        return [upload for *of, upload in uploads if drops.get((of[0], of[1]), False)]
