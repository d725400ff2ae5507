"""Deltas by id, by name with version or alias, and by fingerprint."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, NamedTuple, Self

from sqlalchemy import ColumnElement, Select, and_, false, func, select, update
from sqlalchemy.orm import Session, contains_eager, joinedload, selectinload

from deltadock.errors import Cancelled
from deltadock.names import DEFAULT, parse_reference
from deltadock.storage.database import database_now, lock_key, unindexed
from deltadock.storage.documents import DeltaOptions
from deltadock.storage.ids import new_id
from deltadock.storage.repositories.audit import record
from deltadock.storage.repositories.checkpoints import BaseRepository
from deltadock.storage.repositories.listing import ANY_DELTA, DeltaFilter, DeltaSort, Key, find_page
from deltadock.storage.repositories.models import ModelRepository
from deltadock.storage.repositories.shown import (
    DELTA,
    DELTA_OF_ALIAS,
    DELTA_OF_VERSION,
    LINEAGE,
    SELECT_DELTAS,
    ShownDelta,
)
from deltadock.storage.repositories.totals import TotalsRepository
from deltadock.storage.tables import (
    UNSUCCESSFUL,
    AliasRow,
    AuditAction,
    BaseRow,
    DeltaRow,
    JobPriority,
    JobRow,
    JobState,
    ModelRow,
)
from deltadock.storage.tenancy import Tenant, owned_by, owner_of

FIGURES: Final = ("ratio", "true_bits", "kl", "agreement", "nll", "nll_finetuned", "nll_base")
"""Figures of a report that lists show: columns of their own."""


DIGESTS_PER_QUERY: Final = 500
EXACT_METHOD: Final = "exact"
"""Stores every changed tensor bit for bit: the fine-tune itself."""
COUNTED: Final = 200
"""Deltas in one state; a thousand look-ups."""


class Lineage(NamedTuple):
    """Where a fine-tune comes from, besides its base and calibration."""

    parent_id: str | None = None
    recipe: dict[str, Any] | None = None
    code_version: str | None = None
    code_commit: str | None = None


NO_LINEAGE: Final = Lineage()


class NamedDelta(NamedTuple):
    """What a list of artifacts shows of a delta."""

    id: str
    name: str
    version: int


class Sibling(NamedTuple):
    """One of a fine-tune's deltas."""

    id: str
    name: str
    version: int
    method: str
    true_bits: float | None
    kl: float | None
    checkpoint_digest: str
    options: DeltaOptions

    @property
    def digests(self) -> list[str | None]:
        """Of the texts that it was calibrated on, and so measured; None: sampled."""
        calibration = self.options["calibration"]
        return [source["digest"] for source in calibration["sources"]] if calibration else []

    @classmethod
    def of(cls, delta: ShownDelta) -> Self:
        """A loaded delta."""
        return cls(*(getattr(delta, column) for column in cls._fields))


class DeltaRepository:
    """The tenant's deltas, loaded with their base and job; deleted ones are excluded."""

    def __init__(self, session: Session, tenant: Tenant) -> None:
        self.session = session
        self.tenant = tenant

    def _owned(self) -> ColumnElement[bool]:
        return owned_by(DeltaRow.tenant_id, self.tenant)

    def _loaded(self) -> Select[DeltaRow]:
        return (
            select(DeltaRow)
            .join(DeltaRow.job)
            .options(
                joinedload(DeltaRow.base),
                contains_eager(DeltaRow.job),
                joinedload(DeltaRow.default),
                selectinload(DeltaRow.aliases),
            )
        )

    def _not_deleted(self) -> Select[DeltaRow]:
        return self._loaded().where(DeltaRow.deleted_at.is_(None), self._owned())

    def find(self, delta_id: str) -> DeltaRow | None:
        """The delta with this id, or None."""
        return self.session.scalars(
            self._not_deleted().where(DeltaRow.id == delta_id)
        ).one_or_none()

    def show(self, reference: str) -> ShownDelta | None:
        """As `resolve`, the columns that answers show, by one statement."""
        query, given = DELTA, {"tenant": owner_of(self.tenant), "id": reference}
        if "/" in reference:
            named = parse_reference(reference)
            if named is None:
                return None
            query = DELTA_OF_ALIAS if named.version is None else DELTA_OF_VERSION
            given |= named._asdict()
        row = self.session.execute(query, given).one_or_none()
        return None if row is None else ShownDelta.of(row)

    def resolve(self, reference: str) -> DeltaRow | None:
        """What an id, or a name with or without a version or alias, means now; or None."""
        query = self._not_deleted().execution_options(populate_existing=True)
        if "/" not in reference:
            return self.session.scalars(query.where(DeltaRow.id == reference)).one_or_none()
        named = parse_reference(reference)
        if named is None:
            return None
        if named.version is not None:
            query = query.where(DeltaRow.name == named.name, DeltaRow.version == named.version)
        else:
            query = (
                query.join(AliasRow, AliasRow.delta_id == DeltaRow.id)
                .join(ModelRow, ModelRow.id == AliasRow.model_id)
                .where(
                    owned_by(ModelRow.tenant_id, self.tenant),
                    ModelRow.name == named.name,
                    AliasRow.alias == named.alias,
                )
            )
        return self.session.scalars(query).one_or_none()

    def newest(self, name: str) -> DeltaRow | None:
        """The highest version of a name, ready or not; or None."""
        return self.session.scalars(
            self._not_deleted()
            .where(DeltaRow.name == name)
            .order_by(DeltaRow.version.desc())
            .limit(1)
        ).one_or_none()

    def versions(self, name: str) -> Sequence[DeltaRow]:
        """All versions of a name, ascending."""
        return self.session.scalars(
            self._not_deleted().where(DeltaRow.name == name).order_by(DeltaRow.version)
        ).all()

    def find_same(self, fingerprint: str) -> Sequence[DeltaRow]:
        """Ready or unfinished deltas with this fingerprint, of any name, highest version first.

        Locks the fingerprint until the transaction ends.
        """
        lock_key(self.session, "fingerprint", str(self.tenant), fingerprint)
        return self.session.scalars(
            self._not_deleted()
            .where(
                DeltaRow.fingerprint == fingerprint,
                JobRow.state.not_in(UNSUCCESSFUL),
                JobRow.cancel_requested.is_(False),
            )
            .order_by(DeltaRow.version.desc())
        ).all()

    def find_ended(self, fingerprint: str, name: str) -> DeltaRow | None:
        """The name's newest version with this fingerprint whose job failed or was cancelled."""
        return self.session.scalars(
            self._not_deleted()
            .where(
                DeltaRow.fingerprint == fingerprint,
                DeltaRow.name == name,
                JobRow.state.in_(UNSUCCESSFUL),
            )
            .order_by(DeltaRow.version.desc())
            .limit(1)
        ).one_or_none()

    def page(
        self,
        *,
        limit: int,
        wanted: DeltaFilter = ANY_DELTA,
        sort: DeltaSort = DeltaSort.NEWEST,
        after: Key | None = None,
    ) -> Sequence[ShownDelta]:
        """Up to `limit` deltas that follow the place `after`, in order."""
        ids = find_page(
            self.session,
            owner_of(self.tenant),
            wanted=wanted,
            sort=sort,
            after=after,
            limit=limit,
        )
        by_id = {delta.id: delta for delta in self.with_ids(ids)}
        return [by_id[delta_id] for delta_id in ids]

    def _shown(self, *conditions: ColumnElement[bool]) -> list[ShownDelta]:
        found = self.session.execute(SELECT_DELTAS.where(*conditions))
        return [ShownDelta.of(row) for row in found]

    def with_ids(self, delta_ids: Sequence[str]) -> Sequence[ShownDelta]:
        """Those of these deltas that are there, in no order."""
        own = owned_by(unindexed(DeltaRow.tenant_id), self.tenant)
        return self._shown(DeltaRow.id.in_(delta_ids), DeltaRow.deleted_at.is_(None), own)

    def of_checkpoint(self, digest: str, *, limit: int) -> list[Sibling]:
        """Up to `limit` ready deltas of a fine-tuned checkpoint."""
        return self._siblings(self._of_checkpoint(digest).limit(limit))

    def exact_twin(self, delta: ShownDelta) -> Sibling | None:
        """The newest ready delta that stores the same fine-tune of the same base bit for bit."""
        query = self._of_checkpoint(delta.checkpoint_digest).where(
            unindexed(DeltaRow.base_id) == delta.base.id,
            unindexed(DeltaRow.method) == EXACT_METHOD,
        )
        return next(iter(self._siblings(query.order_by(DeltaRow.created_at.desc()).limit(1))), None)

    def _of_checkpoint(self, digest: str) -> Select[Any]:
        """The columns of `Sibling` of a fine-tuned checkpoint's ready deltas."""
        return select(*(getattr(DeltaRow, column) for column in Sibling._fields)).where(
            DeltaRow.checkpoint_digest == digest,
            DeltaRow.artifact_digest.is_not(None),
            DeltaRow.deleted_at.is_(None),
            owned_by(unindexed(DeltaRow.tenant_id), self.tenant),
        )

    def _siblings(self, query: Select[Any]) -> list[Sibling]:
        return [Sibling(*row) for row in self.session.execute(query)]

    def count_by_state(self) -> dict[JobState, int]:
        """The number of deltas in each state but ready, which the totals count; up to `COUNTED`."""
        states = [state for state in JobState if state is not JobState.READY]
        # No join, for which Postgres would read all deltas of the tenant.
        deleted_at = select(DeltaRow.deleted_at).where(DeltaRow.id == JobRow.delta_id)
        each = [
            select(JobRow.id)
            .where(
                owned_by(JobRow.tenant_id, self.tenant),
                JobRow.state == state,
                deleted_at.scalar_subquery().is_(None),
            )
            .limit(COUNTED)
            .subquery()
            for state in states
        ]
        counts = [select(func.count()).select_from(some).scalar_subquery() for some in each]
        return dict(zip(states, self.session.execute(select(*counts)).one(), strict=True))

    def lineage(self, delta_id: str) -> Lineage:
        """Where the fine-tune of a delta comes from."""
        own = {"id": delta_id, "tenant": owner_of(self.tenant)}
        return Lineage(*self.session.execute(LINEAGE, own).one())

    def report(self, delta_id: str) -> dict[str, Any] | None:
        """The delta's report, or None until it has one."""
        return self.session.scalar(
            select(DeltaRow.report).where(DeltaRow.id == delta_id, self._owned())
        )

    def references(self, delta_ids: Collection[str]) -> dict[str, str]:
        """Names with versions, `project/model:3`, of those of these deltas that there ever were."""
        query = select(DeltaRow.id, DeltaRow.name, DeltaRow.version).where(
            DeltaRow.id.in_(delta_ids), owned_by(unindexed(DeltaRow.tenant_id), self.tenant)
        )
        return {row.id: f"{row.name}:{row.version}" for row in self.session.execute(query)}

    def named_by_artifact(self, digests: Sequence[str]) -> dict[str, list[NamedDelta]]:
        """Deltas with each of these artifacts.

        Of `DIGESTS_PER_QUERY` artifacts at most ten times as many deltas are read, so that one
        that thousands share is not read whole.
        """
        named: dict[str, list[NamedDelta]] = {}
        for start in range(0, len(digests), DIGESTS_PER_QUERY):
            some = digests[start : start + DIGESTS_PER_QUERY]
            query = (
                select(DeltaRow.artifact_digest, DeltaRow.id, DeltaRow.name, DeltaRow.version)
                .where(
                    DeltaRow.artifact_digest.in_(some),
                    DeltaRow.deleted_at.is_(None),
                    owned_by(unindexed(DeltaRow.tenant_id), self.tenant),
                )
                .limit(10 * DIGESTS_PER_QUERY)
            )
            for row in self.session.execute(query):
                named.setdefault(row[0] or "", []).append(NamedDelta(row[1], row[2], row[3]))
        return named

    def add(
        self,
        *,
        name: str,
        base: BaseRow,
        checkpoint_digest: str,
        method: str,
        bits: float | None,
        options: DeltaOptions,
        fingerprint: str,
        priority: JobPriority = JobPriority.NORMAL,
        lineage: Lineage = NO_LINEAGE,
        created_by: str | None = None,
    ) -> DeltaRow:
        """Insert a delta as the next version of `name`, with a queued job.

        Versions of deleted deltas count too, since they are never reused.

        Raises:
            Conflict: the name is a deleted model's.
            NotFound: the base was deleted meanwhile.
        """
        owner = owner_of(self.tenant)
        model = ModelRepository(self.session, owner).open(name)
        BaseRepository(self.session, owner).hold(base)
        model.last_version += 1
        now = database_now(self.session)
        delta = DeltaRow(
            id=new_id("dlt"),
            tenant_id=owner,
            model_id=model.id,
            name=name,
            version=model.last_version,
            base=base,
            checkpoint_digest=checkpoint_digest,
            method=method,
            bits=bits,
            options=options,
            fingerprint=fingerprint,
            parent_id=lineage.parent_id,
            recipe=lineage.recipe,
            code_version=lineage.code_version,
            code_commit=lineage.code_commit,
            created_by=created_by,
            created_at=now,
            job=JobRow(
                id=new_id("job"),
                tenant_id=owner,
                priority=priority,
                created_at=now,
                updated_at=now,
                sent_at=now,
            ),
        )
        self.session.add(delta)
        self.session.flush()
        TotalsRepository(self.session, owner).count_any_delta(1)
        self._record(AuditAction.DELTA_CREATE, delta, checkpoint=checkpoint_digest)
        return delta

    def _record(self, action: AuditAction, delta: DeltaRow, **details: Any) -> None:
        record(
            self.session, delta.tenant_id, action, delta.id,
            name=delta.name, version=delta.version, **details,
        )  # fmt: skip

    def set_result(
        self, delta: DeltaRow, *, artifact_digest: str, artifact_bytes: int, report: dict[str, Any]
    ) -> None:
        """Record the artifact and report; call it in the transaction of the job's `finish`.

        Raises:
            Cancelled: the delta was deleted meanwhile.
        """
        models = ModelRepository(self.session, delta.tenant_id)
        model = models.lock(delta.model_id)
        self.session.refresh(delta, ["deleted_at"])
        if delta.deleted_at is not None:
            raise Cancelled("The delta was deleted.")
        delta.artifact_digest = artifact_digest
        delta.artifact_bytes = artifact_bytes
        delta.report = report
        for figure in FIGURES:
            setattr(delta, figure, report.get(figure))
        self._count(delta, 1)
        models.offer(model, delta)

    def share_result(self, delta: DeltaRow, twin: DeltaRow) -> None:
        """Make a new delta ready with the artifact of `twin`, which has the same fingerprint."""
        models = ModelRepository(self.session, delta.tenant_id)
        model = models.lock(delta.model_id)
        for name in ("artifact_digest", "artifact_bytes", *FIGURES):
            setattr(delta, name, getattr(twin, name))
        delta.job.state = JobState.READY
        delta.job.percent = 100.0
        delta.job.finished_at = delta.created_at
        self._count(delta, 1)
        report = select(DeltaRow.report).where(DeltaRow.id == twin.id).scalar_subquery()
        self.session.execute(
            update(DeltaRow).where(DeltaRow.id == delta.id).values(report=report),
            execution_options={"synchronize_session": False},
        )
        models.offer(model, delta)

    def delete(self, delta: DeltaRow, *, deleted_by: str | None = None) -> None:
        """Mark the delta as deleted; its row keeps name and version.

        Raises:
            Conflict: an alias means it.
        """
        models = ModelRepository(self.session, delta.tenant_id)
        model = models.lock(delta.model_id)
        self._mark_deleted(delta, before=lambda: models.release(model, delta, moved_by=deleted_by))

    def delete_model(self, model: ModelRow, *, deleted_by: str | None) -> None:
        """Mark a locked model and all its versions as deleted; its name is not used again."""
        ModelRepository(self.session, model.tenant_id).delete(model, moved_by=deleted_by)
        for delta in self.versions(model.name):
            self._mark_deleted(delta)

    def _mark_deleted(self, delta: DeltaRow, before: Callable[[], None] = lambda: None) -> None:
        self.session.refresh(delta, ["deleted_at", "artifact_digest", "artifact_bytes"])
        if delta.deleted_at is not None:
            return
        before()
        delta.deleted_at = database_now(self.session)
        TotalsRepository(self.session, delta.tenant_id).count_any_delta(-1)
        if delta.artifact_digest is not None:
            self._count(delta, -1)
        self.session.flush()
        self._record(AuditAction.DELTA_DELETE, delta)

    def deleted(self, reference: str) -> DeltaRow | None:
        """The deleted delta that `restore` would bring back, or None."""
        return self.session.scalars(self._deleted(reference)).one_or_none()

    def _deleted(self, reference: str) -> Select[DeltaRow]:
        named = parse_reference(reference)
        wanted: ColumnElement[bool] = DeltaRow.id == reference
        if named is not None and named.version is not None:
            wanted = and_(DeltaRow.name == named.name, DeltaRow.version == named.version)
        elif named is not None:
            wanted = DeltaRow.name == named.name if named.alias == DEFAULT else false()
        return (
            select(DeltaRow)
            .options(joinedload(DeltaRow.base))
            .where(
                wanted,
                self._owned(),
                DeltaRow.deleted_at.is_not(None),
                DeltaRow.collected_at.is_(None),
            )
            .order_by(DeltaRow.deleted_at.desc(), DeltaRow.version.desc())
            .limit(1)
        )

    def restore(self, reference: str) -> DeltaRow | None:
        """Undo the deletion of a delta by id, version or bare name (the version deleted last).

        None if there is none, or its bytes were given up; aliases mean no deleted delta.

        A deleted model is back with its first restored version; aliases stay where they are now.

        Raises:
            NotFound: its base was deleted.
        """
        if (found := self.deleted(reference)) is None:
            return None
        models = ModelRepository(self.session, self.tenant)
        model = models.lock(found.model_id)
        locked = self._deleted(reference).with_for_update(of=DeltaRow)
        found = self.session.scalars(locked.execution_options(populate_existing=True)).one_or_none()
        if found is None:
            return None
        BaseRepository(self.session, found.tenant_id).hold(found.base)
        if model.deleted_at is not None:
            models.restore(model)
        found.deleted_at = None
        TotalsRepository(self.session, found.tenant_id).count_any_delta(1)
        if found.artifact_digest is not None:
            self._count(found, 1)
            models.offer(model, found)
        self.session.flush()
        self._record(AuditAction.DELTA_RESTORE, found)
        return found

    def _count(self, delta: DeltaRow, sign: int) -> None:
        self.session.flush()
        TotalsRepository(self.session, delta.tenant_id).count_delta(delta, sign)
