"""Listing models, and generating through the node."""

from typing import Any

from fastapi import Request
from sqlalchemy.orm import Session

from deltadock.api.deltas.service import require_ready
from deltadock.api.dependencies import Resources
from deltadock.api.generation.forward import COMPLETIONS, ask_nodes
from deltadock.api.generation.resolver import find
from deltadock.api.generation.schemas import GenerateIn, ModelList, ModelOut
from deltadock.api.generation.target import Target
from deltadock.errors import (
    BaseMismatch,
    ContextExceeded,
    InvalidArtifact,
    InvalidInput,
    ModelNotFound,
    NotFound,
    Overloaded,
    Unavailable,
    UnsupportedModel,
)
from deltadock.storage.models import BaseRow
from deltadock.storage.repositories import BaseRepository, DeltaRepository

NODE_ERRORS = {
    error.code: error
    for error in (
        BaseMismatch,
        ContextExceeded,
        InvalidArtifact,
        InvalidInput,
        ModelNotFound,
        NotFound,
        Overloaded,
        UnsupportedModel,
    )
}


def list_models(session: Session) -> ModelList:
    """Bases by name, ready deltas by id, and each delta name for its highest ready version."""
    bases = [ModelOut.of_base(base) for base in BaseRepository(session).all()]
    ready = DeltaRepository(session).ready()
    latest = {delta.name: delta for delta in sorted(ready, key=lambda delta: delta.version)}
    return ModelList(
        data=[
            *bases,
            *(ModelOut.of_delta(delta.id, delta) for delta in ready),
            *(ModelOut.of_delta(name, delta) for name, delta in sorted(latest.items())),
        ]
    )


def find_model(session: Session, model: str) -> ModelOut:
    """One model in OpenAI's shape, under the name that was asked for.

    Raises:
        NotFound: it stands for nothing.
        NotReady: the delta has no artifact.
    """
    found = find(session, model)
    if isinstance(found, BaseRow):
        return ModelOut.of_base(found)
    require_ready(found)
    return ModelOut.of_delta(model, found)


async def generate(
    resources: Resources, request: Request, target: Target, model: str, body: GenerateIn
) -> dict[str, Any]:
    """The node's completion of one prompt.

    Raises:
        Unavailable, Overloaded, InvalidInput and the like: as the node says.
    """
    wish = {"model": model, **body.model_dump(exclude_none=True)}
    answer = await ask_nodes(resources, request, target, COMPLETIONS, wish)
    completion: dict[str, Any] = await answer.read()
    if answer.status != 200:
        fault = completion.get("error", {}) if isinstance(completion, dict) else {}
        message = str(fault.get("message", f"The inference node answered {answer.status}."))
        kind = InvalidInput if answer.status < 500 else Unavailable
        raise NODE_ERRORS.get(str(fault.get("code")), kind)(message)
    return completion
