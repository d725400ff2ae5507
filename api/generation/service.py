"""Resolves and lists models, and generates text with them through a node."""

from typing import Any, Final

from fastapi import Request
from sqlalchemy.orm import Session

from deltadock.api.access import Caller
from deltadock.api.deltas.lookup import require_ready, show_delta
from deltadock.api.dependencies import Resources
from deltadock.api.generation.forward import COMPLETIONS, ask_nodes
from deltadock.api.generation.metering import Meter
from deltadock.api.generation.schemas import GenerateIn, ModelListOut, ModelOut
from deltadock.api.unknown import MOST_NAMES, unknown
from deltadock.errors import (
    BaseMismatch,
    ContextExceeded,
    InvalidArtifact,
    InvalidInput,
    ModelNotFound,
    NoChatTemplate,
    NotFound,
    Overloaded,
    Unavailable,
    UnsupportedModel,
)
from deltadock.model_target import SERVED, ModelTarget
from deltadock.openai.completions import Completion
from deltadock.storage.repositories import BaseRepository, DeltaRepository, ModelRepository
from deltadock.storage.repositories.shown import ShownDelta
from deltadock.storage.tables import BaseRow

NODE_ERRORS = {
    error.code: error
    for error in (
        BaseMismatch,
        ContextExceeded,
        InvalidArtifact,
        InvalidInput,
        ModelNotFound,
        NoChatTemplate,
        NotFound,
        Overloaded,
        UnsupportedModel,
    )
}

LAST_ID: Final = "~"
"""Sorts after every id."""


def list_models(session: Session, tenant_id: str, *, after: str | None, limit: int) -> ModelListOut:
    """Bases by name, then delta names, each for its default version; only what nodes serve.

    `after` is the id of the previous page's last model. A base's name contains no slash, a delta's
    one.
    """
    found: list[ModelOut] = []
    if after is None or "/" not in after:
        place = None if after is None else (after, LAST_ID)
        bases = BaseRepository(session, tenant_id).page(
            limit=limit + 1, after=place, model_types=SERVED
        )
        found += [ModelOut.of_base(base) for base in bases]
        after = None
    if (room := limit + 1 - len(found)) > 0:
        answering = ModelRepository(session, tenant_id).answering(
            limit=room, after=after, model_types=SERVED
        )
        found += map(ModelOut.of_name, answering)
    return ModelListOut.of(found[:limit], has_more=len(found) > limit)


def get_model(session: Session, tenant_id: str, model: str) -> ModelOut:
    """One model in OpenAI's format, under the requested name.

    Raises:
        NotFound: no model has this name.
        NotReady: the delta has no artifact.
    """
    row = _find(session, tenant_id, model)
    if isinstance(row, BaseRow):
        return ModelOut.of_base(row)
    require_ready(row)
    return ModelOut.of_delta(model, row)


def resolve(session: Session, tenant_id: str, model: str) -> ModelTarget:
    """The weights that `model` names now.

    It may be a delta's id, `project/model` (its default version), `project/model:version`,
    `project/model@alias`, or a base's id or name.

    Raises:
        NotFound: no model has this name.
        NotReady: the delta has no artifact.
    """
    row = _find(session, tenant_id, model)
    return target_of_delta(row) if isinstance(row, ShownDelta) else target_of_base(row)


def target_of_delta(delta: ShownDelta) -> ModelTarget:
    """The base with the delta's artifact; raises NotReady if it has none."""
    return ModelTarget(
        delta.base.checkpoint_digest, require_ready(delta), base_name=delta.base.name
    )


def target_of_base(base: BaseRow) -> ModelTarget:
    """The bare base."""
    return ModelTarget(base.checkpoint_digest, base_name=base.name)


def _find(session: Session, tenant_id: str, model: str) -> ShownDelta | BaseRow:
    row: ShownDelta | BaseRow | None
    row = DeltaRepository(session, tenant_id).show(model)
    if row is None and "/" in model:
        return show_delta(session, tenant_id, model)  # raises what is missing
    row = row or BaseRepository(session, tenant_id).find(model)
    if row is None:
        bases = BaseRepository(session, tenant_id).page(limit=MOST_NAMES)
        models = ModelRepository(session, tenant_id).names_near(model, limit=MOST_NAMES)
        raise unknown("model", model, "/v1/models", [*(base.name for base in bases), *models])
    return row


async def generate(
    resources: Resources,
    request: Request,
    caller: Caller,
    target: ModelTarget,
    model: str,
    body: GenerateIn,
) -> Completion:
    """The node's completion of one prompt; its tokens are charged to the caller's tenant.

    Raises:
        DeltadockError: the error that the node reported.
        Unavailable: no node could answer, or its response is not a completion.
    """
    completion_request = {"model": model, **body.model_dump(exclude_none=True)}
    async with Meter.of(resources, caller, target, completion_request) as meter:
        answer = await ask_nodes(resources, request, target, COMPLETIONS, completion_request, meter)
        completion = _completion(answer.status, await answer.read())
        if meter is not None:
            meter.measure(0 if completion.usage is None else completion.usage.total_tokens)
            await meter.charge()
        return completion


def _completion(status: int, response: Any) -> Completion:
    """The completion that a node answered with.

    Raises:
        DeltadockError: it answered with this error.
        Unavailable: its response is not a completion.
    """
    if status != 200:
        error = response.get("error", {}) if isinstance(response, dict) else {}
        message = str(error.get("message", f"The inference node answered {status}."))
        default = InvalidInput if status < 500 else Unavailable
        raise NODE_ERRORS.get(str(error.get("code")), default)(message)
    try:
        completion = Completion.model_validate(response)
        if not completion.choices:
            raise ValueError("no choices")
    except ValueError as error:  # pydantic's ValidationError is one
        raise Unavailable("The inference node's response is not a completion.") from error
    return completion
