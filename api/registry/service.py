"""Models: finding, describing, moving aliases, deleting."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from deltadock.api.access import Caller
from deltadock.api.paging import Cursor
from deltadock.api.registry.schemas import AliasIn, AliasMoveOut, AliasOut, ModelCardOut, ModelPatch
from deltadock.api.unknown import MOST_NAMES, unknown
from deltadock.errors import Conflict, InvalidInput, NotFound, NotReady
from deltadock.names import DEFAULT, is_alias
from deltadock.storage.repositories import (
    DeltaRepository,
    JobRepository,
    KeyRepository,
    ModelRepository,
)
from deltadock.storage.tables import AliasMoveRow, ModelRow

CURSOR = Cursor("models", str)


def require_model(session: Session, tenant_id: str, name: str, *, lock: bool = False) -> ModelRow:
    """The model of this name.

    Raises:
        NotFound: there is none, or it was deleted.
    """
    models = ModelRepository(session, tenant_id)
    model = models.find(name, lock=lock)
    if model is None:
        if DeltaRepository(session, tenant_id).deleted(name) is not None:
            restore = f"/v1/deltas/{name}/restore"
            raise NotFound(
                f"{name} was deleted; POST {restore} brings its last version back.",
                deleted=name,
                restore=restore,
            )
        raise unknown("model", name, "/v1/registry", models.names_near(name, limit=MOST_NAMES))
    return model


def card_of(session: Session, tenant_id: str, model: ModelRow) -> ModelCardOut:
    """The model with its card and aliases."""
    models = ModelRepository(session, tenant_id)
    return ModelCardOut.of(
        model,
        description=models.description(model),
        aliases=[AliasOut.of(alias) for alias in models.aliases(model)],
    )


def moves_of(session: Session, tenant_id: str, moves: Sequence[AliasMoveRow]) -> list[AliasMoveOut]:
    """The moves, with the names of the keys that made them."""
    names = KeyRepository(session, tenant_id).names({m.moved_by for m in moves if m.moved_by})
    return [AliasMoveOut.of(move, names) for move in moves]


def change_model(session: Session, tenant_id: str, name: str, body: ModelPatch) -> ModelCardOut:
    """Change a model's card, tags or rule.

    Raises:
        NotFound: there is no such model.
    """
    models = ModelRepository(session, tenant_id)
    model = require_model(session, tenant_id, name, lock=True)
    if body.description is not None or body.tags is not None:
        description = models.description(model) if body.description is None else body.description
        models.describe(model, description, model.tags if body.tags is None else body.tags)
    if "rule" in body.model_fields_set:
        models.set_rule(model, body.rule.model_dump() if body.rule else None)
    return card_of(session, tenant_id, model)


def move_alias(session: Session, caller: Caller, name: str, alias: str, body: AliasIn) -> None:
    """Let an alias mean a version.

    Raises:
        InvalidInput: an alias cannot be called so.
        NotFound: there is no such model or version.
        NotReady: the version has no artifact.
        Conflict: the alias does not mean the expected version.
    """
    if not is_alias(alias):
        raise InvalidInput(
            f"{alias!r} cannot be an alias: lower-case letters, digits, '.', '_' and '-', at most "
            "64, a letter first; 'v' with a number means a version."
        )
    models = ModelRepository(session, caller.tenant_id)
    model = require_model(session, caller.tenant_id, name, lock=True)
    delta = DeltaRepository(session, caller.tenant_id).resolve(f"{name}:{body.version}")
    if delta is None:
        raise NotFound(f"{name} has no version {body.version}.")
    if delta.artifact_digest is None:
        raise NotReady(f"{name}:{body.version} is {delta.job.state}.", state=delta.job.state)
    if body.expected is not None:
        now = next((row.version for row in models.aliases(model) if row.alias == alias), 0)
        if now != body.expected:
            raise Conflict(
                f"{name}@{alias} means version {now or 'none'}, not {body.expected}: someone moved "
                "it. Look at the history and decide again.",
                version=now or None,
            )
    models.move(model, alias, delta, reason=body.reason, moved_by=caller.key_id)


def remove_alias(session: Session, caller: Caller, name: str, alias: str) -> None:
    """Remove an alias.

    Raises:
        NotFound: there is no such model or alias.
        Conflict: it is the default, which can only be moved.
    """
    models = ModelRepository(session, caller.tenant_id)
    model = require_model(session, caller.tenant_id, name, lock=True)
    if alias == DEFAULT:
        raise Conflict("A model's default can be moved, not removed.")
    if not models.move(model, alias, None, reason="Removed.", moved_by=caller.key_id):
        raise NotFound(f"There is no alias {name}@{alias}.")


def delete_model(session: Session, caller: Caller, name: str) -> None:
    """Delete a model with all its versions; unfinished ones are cancelled.

    Raises:
        NotFound: there is none.
    """
    model = require_model(session, caller.tenant_id, name, lock=True)
    deltas = DeltaRepository(session, caller.tenant_id)
    jobs = JobRepository(session, caller.tenant_id)
    for delta in deltas.versions(name):
        if not delta.job.state.is_final:
            jobs.request_cancel(delta.job.id)
    deltas.delete_model(model, deleted_by=caller.key_id)
