"""Models, their aliases and what moved them."""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, delete, exists, select
from sqlalchemy.orm import Session

from deltadock.errors import Conflict
from deltadock.names import DEFAULT
from deltadock.storage.database import database_now, lock_key, unindexed
from deltadock.storage.ids import new_id
from deltadock.storage.repositories.audit import record
from deltadock.storage.repositories.checkpoints import is_of_type
from deltadock.storage.repositories.terms import TermFilter, words_of
from deltadock.storage.repositories.webhooks import WebhookRepository
from deltadock.storage.tables import (
    AliasMoveRow,
    AliasRow,
    AuditAction,
    BaseRow,
    DeltaRow,
    ModelRow,
    ModelTermRow,
    TermKind,
    WebhookEvent,
)
from deltadock.storage.tenancy import Tenant, owned_by, owner_of


def _deleted(name: str) -> Conflict:
    return Conflict(f"The model {name!r} was deleted; its name is not used again.")


class Answering(NamedTuple):
    """A model's default version."""

    name: str
    id: str
    version: int
    created_at: datetime
    base: str
    kl: float | None


class ModelRepository:
    """The tenant's models; deleted ones are excluded.

    Whoever changes a model, its aliases or which of its versions are ready holds the lock of its
    row, so that each decision is made on the current state.
    """

    def __init__(self, session: Session, tenant: Tenant) -> None:
        self.session = session
        self.tenant = tenant

    def _owned(self) -> ColumnElement[bool]:
        return owned_by(ModelRow.tenant_id, self.tenant)

    def find(self, name: str, *, lock: bool = False) -> ModelRow | None:
        """The model of this name, or None; `lock` locks its row."""
        query = select(ModelRow).where(
            self._owned(), ModelRow.name == name, ModelRow.deleted_at.is_(None)
        )
        if lock:
            query = query.with_for_update().execution_options(populate_existing=True)
        return self.session.scalars(query).one_or_none()

    def lock(self, model_id: str) -> ModelRow:
        """The model with this id, locked."""
        return self.session.scalars(
            select(ModelRow)
            .where(ModelRow.id == model_id)
            .with_for_update()
            .execution_options(populate_existing=True)
        ).one()

    def open(self, name: str) -> ModelRow:
        """The locked model of this name, new if there was none.

        Raises:
            Conflict: the name is a deleted model's.
        """
        owner = owner_of(self.tenant)
        lock_key(self.session, "name", owner, name)
        found = self.session.scalars(
            select(ModelRow)
            .where(ModelRow.tenant_id == owner, ModelRow.name == name)
            .with_for_update()
            .execution_options(populate_existing=True)
        ).one_or_none()
        if found is None:
            found = ModelRow(
                id=new_id("mdl"), tenant_id=owner, name=name, last_version=0, tags=[],
                created_at=database_now(self.session),
            )  # fmt: skip
            self.session.add(found)
            self.session.flush()
            self._index(found, TermKind.WORD, words_of(name))
        elif found.deleted_at is not None:
            raise _deleted(name)
        return found

    def check_open(self, name: str) -> None:
        """Check what `open` will.

        Raises:
            Conflict: the name is a deleted model's.
        """
        deleted = select(ModelRow.id).where(
            self._owned(), ModelRow.name == name, ModelRow.deleted_at.is_not(None)
        )
        if self.session.scalar(deleted) is not None:
            raise _deleted(name)

    def page(
        self,
        *,
        limit: int,
        after: str | None = None,
        tag: str | None = None,
        text: str | None = None,
    ) -> Sequence[ModelRow]:
        """Up to `limit` models by name, that follow the name `after`."""
        owner = owner_of(self.tenant)
        query = select(ModelRow).where(ModelRow.deleted_at.is_(None))
        if after is not None:
            query = query.where(ModelRow.name > after)
        terms = TermFilter(self.session, owner, tag=tag, text=text)
        if terms.few is None:
            query = query.where(ModelRow.tenant_id == owner)
        else:
            query = query.where(ModelRow.id.in_(terms.few), unindexed(ModelRow.tenant_id) == owner)
        query = query.where(*terms.conditions(ModelRow.id))
        return self.session.scalars(query.order_by(ModelRow.name).limit(limit)).all()

    def names_near(self, name: str, *, limit: int) -> list[str]:
        """Names of models that precede or follow `name` in the alphabet, up to `limit` of each."""
        query = select(ModelRow.name).where(self._owned(), ModelRow.deleted_at.is_(None))
        before = query.where(ModelRow.name < name).order_by(ModelRow.name.desc())
        after = query.where(ModelRow.name >= name).order_by(ModelRow.name)
        return [
            found for part in (before, after) for found in self.session.scalars(part.limit(limit))
        ]

    def answering(
        self,
        *,
        limit: int,
        after: str | None = None,
        model_types: Collection[str] | None = None,
    ) -> list[Answering]:
        """What up to `limit` bare names that follow `after` mean, by name."""
        query = (
            select(
                ModelRow.name,
                DeltaRow.id,
                DeltaRow.version,
                DeltaRow.created_at,
                BaseRow.name,
                DeltaRow.kl,
            )
            .join(AliasRow, AliasRow.model_id == ModelRow.id)
            .join(DeltaRow, DeltaRow.id == AliasRow.delta_id)
            .join(BaseRow, BaseRow.id == DeltaRow.base_id)
            .where(
                ModelRow.tenant_id == owner_of(self.tenant),
                ModelRow.deleted_at.is_(None),
                AliasRow.alias == DEFAULT,
            )
            .order_by(ModelRow.name)
            .limit(limit)
        )
        if after is not None:
            query = query.where(ModelRow.name > after)
        if model_types is not None:
            query = query.where(is_of_type(model_types))
        return [Answering(*row) for row in self.session.execute(query)]

    def description(self, model: ModelRow) -> str:
        """The model card."""
        return (
            self.session.scalar(select(ModelRow.description).where(ModelRow.id == model.id)) or ""
        )

    def describe(self, model: ModelRow, description: str, tags: Sequence[str]) -> None:
        """Set the description and tags of a locked model."""
        model.description, model.tags = description, list(tags)
        self.session.execute(delete(ModelTermRow).where(ModelTermRow.model_id == model.id))
        self._index(model, TermKind.TAG, tags)
        self._index(model, TermKind.WORD, words_of(model.name, description))
        self._record(AuditAction.MODEL_CHANGE, model, tags=list(tags))

    def _record(self, action: AuditAction, model: ModelRow, **details: Any) -> None:
        record(self.session, model.tenant_id, action, model.name, **details)

    def _index(self, model: ModelRow, kind: TermKind, terms: Iterable[str]) -> None:
        self.session.add_all(
            ModelTermRow(tenant_id=model.tenant_id, kind=kind, term=term, model_id=model.id)
            for term in terms
        )
        self.session.flush()

    def aliases(self, model: ModelRow) -> Sequence[AliasRow]:
        """The model's aliases, by name."""
        return self.session.scalars(
            select(AliasRow).where(AliasRow.model_id == model.id).order_by(AliasRow.alias)
        ).all()

    def history(
        self, model: ModelRow, *, limit: int, before: int | None = None
    ) -> Sequence[AliasMoveRow]:
        """Up to `limit` moves of the model's aliases, newest first, before the move `before`."""
        query = select(AliasMoveRow).where(AliasMoveRow.model_id == model.id)
        if before is not None:
            query = query.where(AliasMoveRow.id < before)
        return self.session.scalars(query.order_by(AliasMoveRow.id.desc()).limit(limit)).all()

    def move(
        self,
        model: ModelRow,
        alias: str,
        to: DeltaRow | None,
        *,
        reason: str,
        moved_by: str | None = None,
        last_contender: int | None = None,
    ) -> bool:
        """Move an alias of a locked model to a version, or remove it (None).

        Returns whether it meant something else before.
        """
        row = self.session.get(AliasRow, (model.id, alias), populate_existing=True)
        before = None if row is None else row.version
        after = None if to is None else to.version
        if row is not None:
            row.last_contender = last_contender
        if before == after:
            return False
        now = database_now(self.session)
        if to is None:
            assert row is not None
            self.session.delete(row)
        elif row is None:
            self.session.add(
                AliasRow(
                    model_id=model.id,
                    alias=alias,
                    delta_id=to.id,
                    version=to.version,
                    last_contender=last_contender,
                    moved_at=now,
                )
            )
        else:
            row.delta_id, row.version, row.moved_at = to.id, to.version, now
        self.session.add(
            AliasMoveRow(
                model_id=model.id, alias=alias, from_version=before, to_version=after,
                reason=reason, moved_by=moved_by, at=now,
            )
        )  # fmt: skip
        self.session.flush()
        self._record(
            AuditAction.ALIAS_MOVE, model,
            alias=alias, from_version=before, to_version=after, reason=reason,
        )  # fmt: skip
        WebhookRepository(self.session, model.tenant_id).publish(
            WebhookEvent.ALIAS_MOVED,
            {
                "model": model.name,
                "alias": alias,
                "from_version": before,
                "to_version": after,
                "delta": None if to is None else to.id,
                "reason": reason,
            },
        )
        return True

    def offer(self, model: ModelRow, delta: DeltaRow) -> None:
        """Let a version that is ready now become the default of its locked model.

        Without a rule the first ready one does, if there is no default; of the versions of the
        same fine-tune that were pushed by then, one with a lower KL replaces it, and if it is far
        from its fine-tune, so does a later one that is not. With a rule, a
        newer version does whose KL is at most `max_kl`, and at most `max_increase` above the
        default's.
        """
        row = self.session.get(AliasRow, (model.id, DEFAULT), populate_existing=True)
        if model.rule is None:
            if row is None:
                self.move(
                    model,
                    DEFAULT,
                    delta,
                    reason="The first ready version.",
                    last_contender=model.last_version,
                )
            elif row.last_contender is not None:
                self._contend(model, delta, row, row.last_contender)
            return
        kl, most = delta.kl, model.rule["max_kl"]
        if kl is None or kl > most:
            return
        if row is not None:
            current = self.session.get_one(DeltaRow, row.delta_id)
            if delta.version < row.version or current.kl is None:
                return
            most = min(most, current.kl + model.rule["max_increase"])
            if kl > most:
                return
        self.move(model, DEFAULT, delta, reason=f"The rule: KL {kl:.4g} is at most {most:.4g}.")

    def _contend(
        self, model: ModelRow, delta: DeltaRow, row: AliasRow, last_contender: int
    ) -> None:
        """Let a better version replace a default that nobody chose.

        Of another fine-tune a KL is no measure of which is better; on another calibration text
        only whether it is far is.
        """
        current = self.session.get_one(DeltaRow, row.delta_id)
        if delta.checkpoint_digest != current.checkpoint_digest:
            return
        if delta.kl is None or current.kl is None:
            return
        same_text = delta.options["calibration"] == current.options["calibration"]
        if self._is_far(current) and not self._is_far(delta):
            reason = (
                f"Version {row.version} is far from its fine-tune, with a KL of {current.kl:.4g}; "
                f"this one has {delta.kl:.4g}."
            )
        elif delta.version <= last_contender and same_text and delta.kl < current.kl:
            reason = (
                f"Pushed before version {row.version} was ready, and closer to its fine-tune: "
                f"KL {delta.kl:.4g} instead of {current.kl:.4g}."
            )
        else:
            return
        self.move(model, DEFAULT, delta, reason=reason, last_contender=last_contender)

    def _is_far(self, delta: DeltaRow) -> bool:
        """Whether its report says that a version is far from its fine-tune."""
        is_far = DeltaRow.report["is_far"].as_boolean()
        return bool(self.session.scalar(select(is_far).where(DeltaRow.id == delta.id)))

    def set_rule(self, model: ModelRow, rule: dict[str, Any] | None) -> None:
        """Set or remove the rule of a locked model; the newest version that meets it is offered."""
        model.rule = rule
        self.session.flush()
        self._record(AuditAction.MODEL_CHANGE, model, rule=rule)
        if rule is None:
            return
        newest = self.session.scalars(
            select(DeltaRow)
            .where(
                DeltaRow.tenant_id == model.tenant_id,
                DeltaRow.name == model.name,
                DeltaRow.deleted_at.is_(None),
                DeltaRow.artifact_digest.is_not(None),
                DeltaRow.kl <= rule["max_kl"],
            )
            .order_by(DeltaRow.version.desc())
            .limit(1)
        ).one_or_none()
        if newest is not None:
            self.offer(model, newest)

    def release(self, model: ModelRow, delta: DeltaRow, *, moved_by: str | None) -> None:
        """Remove the aliases of a version that is to be deleted from its locked model.

        Raises:
            Conflict: an alias means it, and is not only the default of the last ready version.
        """
        named = self.session.scalars(
            select(AliasRow.alias).where(AliasRow.delta_id == delta.id).order_by(AliasRow.alias)
        ).all()
        others = exists().where(
            DeltaRow.tenant_id == model.tenant_id,
            DeltaRow.name == model.name,
            DeltaRow.id != delta.id,
            DeltaRow.deleted_at.is_(None),
            DeltaRow.artifact_digest.is_not(None),
        )
        if not named:
            return
        if list(named) != [DEFAULT] or self.session.scalar(select(others)):
            aliases = ", ".join(f"@{alias}" for alias in named)
            raise Conflict(
                f"{model.name}:{delta.version} is in use as {aliases}: point that at another "
                "version first, or delete the whole model.",
                aliases=list(named),
            )
        self.move(model, DEFAULT, None, reason="Its version was deleted.", moved_by=moved_by)

    def restore(self, model: ModelRow) -> None:
        """Undo the deletion of a locked model, but for its aliases."""
        model.deleted_at = None
        self.describe(model, self.description(model), model.tags)

    def delete(self, model: ModelRow, *, moved_by: str | None) -> None:
        """Delete a locked model whose versions are deleted; its name is for no other model."""
        for alias in self.aliases(model):
            self.move(model, alias.alias, None, reason="The model was deleted.", moved_by=moved_by)
        self.session.execute(delete(ModelTermRow).where(ModelTermRow.model_id == model.id))
        model.deleted_at = database_now(self.session)
        self.session.flush()
        self._record(AuditAction.MODEL_DELETE, model)
