"""Routes of models: `/v1/registry/{project}/{model}`, and what a name means now."""

import re
from typing import Annotated, Final

from fastapi import Depends, Path, Query

from deltadock.api.access import CallerDep
from deltadock.api.deltas.lookup import require_ready, show_delta
from deltadock.api.deltas.schemas import DeltaOut
from deltadock.api.dependencies import ReadSession, WriteUnit
from deltadock.api.paging import After, Limit
from deltadock.api.references import DeltaReference
from deltadock.api.registry import service
from deltadock.api.registry.schemas import (
    AliasIn,
    HistoryPage,
    ModelCardOut,
    ModelEntry,
    ModelPage,
    ModelPatch,
    Resolved,
)
from deltadock.api.routing import api_router
from deltadock.errors import Conflict, InvalidInput, NotFound, NotReady
from deltadock.names import ALIAS_PATTERN, DIGEST
from deltadock.problems import problems
from deltadock.storage.repositories import DeltaRepository, ModelRepository

router = api_router("/v1", tags=["registry"])

_DIGEST: Final = re.compile(DIGEST)


async def model_name(
    project: Annotated[str, Path(max_length=96, examples=["maths"])],
    model: Annotated[str, Path(max_length=96, examples=["skills"])],
) -> str:
    """The name `project/model` in the path."""
    return f"{project}/{model}"


Name = Annotated[str, Depends(model_name)]
Alias = Annotated[str, Path(examples=["prod"], json_schema_extra={"pattern": ALIAS_PATTERN})]


@router.get("/registry", responses=problems(NotFound))
def list_registry(
    caller: CallerDep,
    session: ReadSession,
    tag: Annotated[str | None, Query(max_length=64)] = None,
    text: Annotated[
        str | None,
        Query(max_length=200, description="Words, or beginnings of words, of name or card."),
    ] = None,
    after: After = None,
    limit: Limit = 50,
) -> ModelPage:
    """List the models by name."""
    place = service.CURSOR.read(after)
    found = ModelRepository(session, caller.tenant_id).page(
        limit=limit + 1, after=place[0] if place else None, tag=tag, text=text
    )
    page, following = service.CURSOR.page(found, limit, lambda model: [model.name])
    return ModelPage(data=[ModelEntry.of(model) for model in page], next=following)


@router.get("/registry/{project}/{model}", responses=problems(NotFound))
def get_model_card(name: Name, caller: CallerDep, session: ReadSession) -> ModelCardOut:
    """Get a model with its card, rule and aliases; GET /v1/deltas?name= lists its versions."""
    model = service.require_model(session, caller.tenant_id, name)
    return service.card_of(session, caller.tenant_id, model)


@router.patch("/registry/{project}/{model}", responses=problems(NotFound))
def change_model(name: Name, body: ModelPatch, caller: CallerDep, unit: WriteUnit) -> ModelCardOut:
    """Change a model's card, tags or rule; a new rule is applied at once."""
    return service.change_model(unit.session, caller.tenant_id, name, body)


@router.delete("/registry/{project}/{model}", status_code=204, responses=problems(NotFound))
def delete_model(name: Name, caller: CallerDep, unit: WriteUnit) -> None:
    """Delete a model with all its versions. For some days each can be restored, and the model with
    it; its name is never another model's.
    """
    service.delete_model(unit.session, caller, name)


@router.put(
    "/registry/{project}/{model}/aliases/{alias}",
    responses=problems(NotFound, NotReady, Conflict, InvalidInput),
)
def move_alias(
    name: Name, alias: Alias, body: AliasIn, caller: CallerDep, unit: WriteUnit
) -> ModelCardOut:
    """Let `project/model@alias` mean a version; `default` is what the bare name means."""
    service.move_alias(unit.session, caller, name, alias, body)
    return get_model_card(name, caller, unit.session)


@router.delete(
    "/registry/{project}/{model}/aliases/{alias}",
    status_code=204,
    responses=problems(NotFound, Conflict),
)
def remove_alias(name: Name, alias: Alias, caller: CallerDep, unit: WriteUnit) -> None:
    """Remove an alias other than `default`."""
    service.remove_alias(unit.session, caller, name, alias)


@router.get("/registry/{project}/{model}/history", responses=problems(NotFound))
def list_alias_moves(
    name: Name,
    caller: CallerDep,
    session: ReadSession,
    after: Annotated[
        int | None, Query(ge=1, lt=2**63, description="`next` of the last page.")
    ] = None,
    limit: Limit = 50,
) -> HistoryPage:
    """List who moved which alias when, from and to which version, and why; newest first."""
    model = service.require_model(session, caller.tenant_id, name)
    moves = ModelRepository(session, caller.tenant_id).history(model, limit=limit + 1, before=after)
    page = moves[:limit]
    return HistoryPage(
        data=service.moves_of(session, caller.tenant_id, page),
        next=page[-1].id if len(moves) > limit else None,
    )


@router.get("/resolve/{reference:reference}", responses=problems(NotFound, NotReady))
def resolve_name(reference: DeltaReference, caller: CallerDep, session: ReadSession) -> Resolved:
    """Get the digests that a name or id means now; the bytes of a digest never change.

    An artifact's digest is taken too: the answer is one of the deltas that have it.
    """
    if _DIGEST.fullmatch(reference):
        named = DeltaRepository(session, caller.tenant_id).named_by_artifact([reference])
        reference = named[reference][0].id if named else reference
    delta = show_delta(session, caller.tenant_id, reference)
    return Resolved.of(DeltaOut.of(delta), require_ready(delta))
